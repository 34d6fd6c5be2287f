"""What can be asked of the pairs that a memory was learned from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeVar

from everlong.evaluation.grounded import cloze
from everlong.evaluation.probes import Probe
from everlong.memory.pairs import Pair

_MOST = 40  # of each form
_LONGEST = 6  # words of an answer that is asked for

_Any = TypeVar("_Any")


def pair_probes(pairs: Sequence[Pair], seed: int = 0) -> list[Probe]:
    """Return what can be asked of the pairs that a memory was learned from.

    Pairs of the generator "questions" with a short answer are asked as they are. Of each sentence that
    "cloze" went on with, a word is left out; it is learned by itself, and again behind the one before it:
    that one is left out. A memory of neither is asked for words of the text that "text" made of it. What
    other generators made is not the text's, or has no answer that could be told right from wrong.

    Parameters
    ----------
    pairs : sequence of Pair
        Of one memory.
    seed : int
        Same seed, same probes.

    Returns
    -------
    list of Probe
        At most 40 questions and 40 sentences, drawn from all, in the order of the pairs.
    """
    questions = [
        Probe(f"Question: {pair.query.strip()}\nAnswer:", (pair.response.strip(),), "question")
        for pair in pairs
        if pair.generator == "questions"
        and 0 < len(pair.response.split()) <= _LONGEST
        and any(map(str.isalnum, pair.response))
    ]
    sentences = [probe for text in _sentences(pairs) for probe in cloze(text, 1, seed)]
    if not questions and not sentences:
        texts = "\n".join(pair.response for pair in pairs if pair.generator == "text")
        sentences = cloze(texts, _MOST, seed)
    return [*_drawn(questions, f"questions {seed}"), *_drawn(sentences, f"sentences {seed}")]


def _sentences(pairs: Sequence[Pair]) -> list[str]:
    """Return what "cloze" went on with, each once, without what stood before it."""
    shortest: dict[Any, str] = {}
    for pair in pairs:
        if pair.generator == "cloze":
            which = pair.segment, pair.sentences, pair.response
            shortest[which] = min(shortest.get(which, pair.query), pair.query, key=len)
    return list(dict.fromkeys((query + which[-1]).strip() for which, query in shortest.items()))


def _drawn(every: Sequence[_Any], seed: str) -> list[_Any]:
    """Return some of them, in their order; each once."""
    once = list(dict.fromkeys(every))
    some = random.Random(seed).sample(range(len(once)), min(_MOST, len(once)))
    return [once[at] for at in sorted(some)]
