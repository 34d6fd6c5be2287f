"""The gate: whether a text is worth anything to the model that reads it, asked before anything is trained.

Two things tell. What reading adds to the likelihood of pairs, by the kind of pair: next to nothing, and they
would teach what is known. And how many of its own questions the model answers with the whole segment before
them, beyond those it answers without. The first alone is not enough: any model finds likelier what it has
just seen, even one that cannot tell which fact belongs to whom. Those questions are asked that say, by a
lexical search, which sentence they are about: no reader can answer others. Pairs are taken for independent.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from everlong.errors import MemoryGateError
from everlong.memory.elicitation import Generator, plain
from everlong.memory.lexical import LexicalIndex
from everlong.memory.pairs import Pair
from everlong.memory.segments import Segment
from everlong.memory.writer import Writer

LEAST_GAIN = 0.1
"""Nats per token that reading must add to pairs of a kind."""
LEAST_ANSWERED = 0.2
"""Share of questions that must be answered reading, beyond those answered without."""
_FEWEST = 8  # pairs that an interval is taken from; of fewer, the mean counts
_ASKED = 48  # questions the model is asked again, in all
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Worth:
    """What a text is worth to pairs of one kind.

    Attributes
    ----------
    pairs : int
        That were elicited.
    total, squares : float
        Sums of their gains, in nats per token, and of the squares of these.
    asked, reading, without : int
        Pairs that were asked again, and how many of them were answered with the segment, and without.
    """

    pairs: int = 0
    total: float = 0.0
    squares: float = 0.0
    asked: int = 0
    reading: int = 0
    without: int = 0

    @property
    def gain(self) -> tuple[float, float, float]:
        """The mean gain with its 95 % interval, infinite of fewer than two pairs."""
        mean, n = self.total / max(1, self.pairs), self.pairs
        if n < 2:
            return mean, -math.inf, math.inf
        half = _Z * math.sqrt(max(0.0, self.squares - n * mean**2) / (n - 1) / n)
        return mean, mean - half, mean + half

    @property
    def answered(self) -> tuple[float, float, float]:
        """The share answered reading less that without, with its 95 % interval (Newcombe's, 1998)."""
        (p, low, high), (q, least, most) = (_share(x, self.asked) for x in (self.reading, self.without))
        return p - q, p - q - math.hypot(p - low, most - q), p - q + math.hypot(high - p, q - least)

    @property
    def has_gain(self) -> bool:
        """Whether reading clearly adds to the pairs' likelihood."""
        mean, low, _ = self.gain
        return (low if self.pairs >= _FEWEST else mean) >= LEAST_GAIN

    @property
    def is_read(self) -> bool:
        """Whether reading clearly helps to answer; taken for granted where too few pairs ask anything."""
        share, low, _ = self.answered
        return self.asked < _FEWEST or (share >= LEAST_ANSWERED and low > 0)

    def with_gains(self, gains: Iterable[float]) -> Worth:
        """Return it with more pairs counted."""
        gains = list(gains)
        return replace(
            self,
            pairs=self.pairs + len(gains),
            total=self.total + sum(gains),
            squares=self.squares + sum(gain**2 for gain in gains),
        )

    def values(self) -> dict[str, float]:
        """Return numbers for a record, as JSON takes them."""
        found: dict[str, float] = {"pairs": self.pairs, "gain": self.gain[0]}
        if self.pairs > 1:
            found |= {"gain_low": self.gain[1], "gain_high": self.gain[2]}
        if self.asked:
            found |= {"asked": self.asked, "reading": self.reading, "without": self.without}
        return found


def weighed(
    known: Mapping[str, Worth],
    generators: Sequence[Generator],
    pairs: Sequence[Pair],
    segment: Segment,
    writer: Writer | None,
    seed: int,
) -> dict[str, Worth]:
    """Add the pairs of a segment to what is known of each kind.

    Parameters
    ----------
    known : mapping of str to Worth
        By the generator's name.
    generators : sequence of Generator
        That made the pairs.
    pairs : sequence of Pair
        With their gains.
    segment : Segment
        What they are about.
    writer : Writer or None
        Answers again those that ask something, until enough were; None: nobody does.
    seed : int
        Of the draw of these.
    """
    found, sentences = dict(known), LexicalIndex(segment.sentences)
    for generator in generators:
        own = [pair for pair in pairs if pair.generator == generator.name]
        if not own:
            continue
        worth = found.get(generator.name, Worth()).with_gains(pair.gain or 0.0 for pair in own)
        told = [pair for pair in own if _tells(pair, sentences)]
        some = random.Random(seed).sample(told, max(0, min(len(told), _ASKED - worth.asked)))
        reading, without = (_answered(generator, some, text, writer) for text in (segment.text, ""))
        if reading is not None and without is not None:
            worth = replace(
                worth,
                asked=worth.asked + len(some),
                reading=worth.reading + reading,
                without=worth.without + without,
            )
        found[generator.name] = worth
    return found


def without_worth(known: Mapping[str, Worth], segment: int) -> set[str]:
    """Return which kinds of pairs are not to be learned, others being worth it.

    Raises
    ------
    MemoryGateError
        None is worth it; or the text does not help the model to answer.
    """
    unread = [worth for worth in known.values() if not worth.is_read]
    if unread:
        worth = unread[0]
        share, low, high = worth.answered
        raise MemoryGateError(
            f"segment {segment + 1}: with the text before it, this model answers {worth.reading} of "
            f"{worth.asked} of its own questions, without it {worth.without} ({100 * share:+.0f} %, from "
            f"{100 * low:+.0f} to {100 * high:+.0f}; {100 * LEAST_ANSWERED:.0f} are needed): it does not use "
            f"the text well enough to teach itself. {_REMEDY}"
        )
    lacking = {name for name, worth in known.items() if not worth.has_gain}
    if lacking and len(lacking) == len(known):
        said = ", ".join(f"{_with_interval(known[name])} to {known[name].pairs} pairs" for name in known)
        raise MemoryGateError(
            f"segment {segment + 1}: reading the text adds {said}; {LEAST_GAIN} are needed: this model does "
            f"not use it well enough to teach itself. {_REMEDY}"
        )
    return lacking


_REMEDY = (
    "Use a larger model, or one as teacher=; or generators=('cloze',), which learns the text word for word; "
    "or force it"
)


def _with_interval(worth: Worth) -> str:
    mean, low, high = worth.gain
    return f"{mean:.2f} nats per token" + (f" ({low:.2f} to {high:.2f})" if worth.pairs > 1 else "")


def _tells(pair: Pair, sentences: LexicalIndex) -> bool:
    """Whether a pair's query is most alike to a sentence that the pair is about."""
    return any(number in pair.sentences for number, _ in sentences.search(pair.query, 1))


def _answered(generator: Generator, pairs: Sequence[Pair], text: str, writer: Writer | None) -> int | None:
    """Return how many pairs are answered, the response standing in the answer; None: none is asked."""
    answers = generator.answers(pairs, text, writer) if pairs and writer is not None else None
    if answers is None:
        return None
    return sum(plain(pair.response) in plain(a) for a, pair in zip(answers, pairs, strict=True))


def _share(hits: int, samples: int) -> tuple[float, float, float]:
    """Return a share with Wilson's score interval of 95 %."""
    if not samples:
        return 0.0, 0.0, 1.0
    p, z2 = hits / samples, _Z**2
    middle = (p + z2 / (2 * samples)) / (1 + z2 / samples)
    half = _Z / (1 + z2 / samples) * math.sqrt(p * (1 - p) / samples + z2 / (4 * samples**2))
    return p, middle - half, middle + half
