"""Real text: passages of it, words left out of them, and how well they are predicted."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.loss import surprisal
from everlong.evaluation.probes import Probe
from everlong.reading.tokens import TextCoder

_LEAST_LETTERS = 6  # of a word that is left out: shorter ones can mostly be guessed
_LEAST_BEFORE = 4  # words of its sentence that stand before it
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"'”’)]*\s*|[^.!?]+$")
_TRIES = 8  # positions drawn before the first possible one is taken
_CHARACTERS = 16  # of text to look at for each token that is wanted


@dataclass(frozen=True)
class Passage:
    """Some of a text, and what follows it there.

    Attributes
    ----------
    text : str
        The passage, from the beginning of a word.
    continuation : str
        As many tokens that come after it.
    start : int
        Where it begins in the text, in characters.
    """

    text: str
    continuation: str
    start: int


def passages(source: str | Path, tokenizer: Any, tokens: int, count: int, seed: int) -> list[Passage]:
    """Return passages of a text that do not overlap, continuations included.

    Parameters
    ----------
    source : str or Path
        A text, or the path of a text file in UTF-8.
    tokenizer : transformers.PreTrainedTokenizerBase
        Counts the tokens.
    tokens : int
        Of a passage; its continuation has as many.
    count : int
        Of passages, in the order of the text.
    seed : int
        Same seed, same positions.

    Raises
    ------
    ConfigurationError
        A number is not at least 1.
    InputError
        The text is too short for that, or cannot be read.
    """
    if tokens < 1 or count < 1:
        raise ConfigurationError(f"{count} passages of {tokens} tokens: at least 1 of each")
    text = _text_of(source)
    coder = TextCoder(tokenizer)
    draw = random.Random(f"passages {seed}")
    width = len(text) // count
    found: list[Passage] = []
    for number in range(count):
        begin, end = number * width, (number + 1) * width
        tried = [draw.randrange(begin, end) for _ in range(_TRIES)] if width else []
        cuts = (_cut(coder, text, _word_start(text, at, end), end, tokens) for at in [*tried, begin])
        passage = next((cut for cut in cuts if cut is not None), None)
        if passage is None:
            raise InputError(
                f"the text has no room for {count} passages of {tokens} tokens and their continuations; "
                "ask for fewer or shorter ones"
            )
        found.append(passage)
    return found


def cloze(text: str, count: int, seed: int) -> list[Probe]:
    """Return sentences of a text that end before a content word, which is the answer.

    Parameters
    ----------
    text : str
        Whose words are left out.
    count : int
        Probes at most: one a sentence while there are sentences, and fewer if there are not so many words.
    seed : int
        Same seed, same words.

    Returns
    -------
    list of Probe
        Of the form "cloze", in the order of the text.
    """
    draw = random.Random(f"cloze {seed}")
    candidates = []
    for sentence in (match.group() for match in _SENTENCE.finditer(text)):
        words = list(_WORD.finditer(sentence))
        fit = [
            word
            for i, word in enumerate(words)
            if i >= _LEAST_BEFORE
            and len(word.group()) >= _LEAST_LETTERS
            and not any(word.group().casefold() == other.group().casefold() for other in words[:i])
        ]
        candidates.append([(sentence, word) for word in draw.sample(fit, len(fit))])
    rounds = range(max(map(len, candidates), default=0))
    chosen: list[tuple[int, int, Probe]] = []
    for depth in rounds:
        level = [(i, row[depth]) for i, row in enumerate(candidates) if depth < len(row)]
        for i, (sentence, word) in draw.sample(level, min(len(level), count - len(chosen))):
            prompt = " ".join(sentence[: word.start()].split())
            chosen.append((i, word.start(), Probe(prompt, (word.group(),), "cloze")))
    return [probe for _, _, probe in sorted(chosen, key=lambda one: one[:2])]


@dataclass(frozen=True, eq=False)
class PassageLoss:
    """How a passage is predicted from nothing, and what follows it.

    Attributes
    ----------
    passage : Tensor
        Surprisal of its tokens in nats, shape (n,).
    continuation : Tensor
        Of its continuation's, from nothing.
    continuation_read : Tensor
        Of its continuation's, when the passage has been read: what a memory of it can hope for.
    """

    passage: Tensor
    continuation: Tensor
    continuation_read: Tensor


def passage_loss(model: Any, tokenizer: Any, passage: Passage) -> PassageLoss:
    """Score a passage and its continuation, as :func:`~everlong.evaluation.loss.surprisal` does."""
    return PassageLoss(
        surprisal(model, tokenizer, passage.text),
        surprisal(model, tokenizer, passage.continuation),
        surprisal(model, tokenizer, passage.continuation, before=passage.text),
    )


def _text_of(source: str | Path) -> str:
    if isinstance(source, str):
        return source
    try:
        return source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source} cannot be read as text: {error}") from error


def _cut(coder: TextCoder, text: str, start: int, end: int, tokens: int) -> Passage | None:
    """Return the passage that begins there, if it and its continuation end before `end`."""
    first = _characters(coder, text[start:end], tokens)
    second = None if first is None else _characters(coder, text[start + first : end], tokens)
    if first is None or second is None:
        return None
    return Passage(text[start : start + first], text[start + first : start + first + second], start)


def _word_start(text: str, at: int, end: int) -> int:
    """Return the beginning of the first word that begins at or after a place."""
    while 0 < at < end and not (text[at - 1].isspace() and not text[at].isspace()):
        at += 1
    return at


def _characters(coder: TextCoder, text: str, tokens: int) -> int | None:
    """Return how many characters the first `tokens` tokens of a text are; None if it has fewer."""
    piece = text[: _CHARACTERS * tokens]
    ids = coder.encode(piece)
    if len(ids) < tokens:
        if len(piece) == len(text):
            return None
        raise InputError(f"fewer than {tokens} tokens in {len(piece)} characters: is this plain text?")
    low, high = 1, len(piece)
    while low < high:  # the shortest beginning with so many tokens
        middle = (low + high) // 2
        if len(coder.encode(piece[:middle])) < tokens:
            low = middle + 1
        else:
            high = middle
    return low
