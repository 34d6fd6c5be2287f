"""Passkeys in texts of several lengths, asked for under several ways to read: who finds them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from everlong.errors import ConfigurationError
from everlong.evaluation.long_inputs import Answer, Way, answer
from everlong.evaluation.needles import Needle, passkey
from everlong.evaluation.statistics import Interval, share_interval
from everlong.models.loading import LoadedModel


@dataclass(frozen=True)
class PasskeyPlan:
    """What is hidden, and where.

    Attributes
    ----------
    lengths : tuple of int
        Tokens of text and question together.
    digits : tuple of int
        Of a passkey.
    samples : int
        Texts of each kind, with other passkeys, at depths spread evenly from beginning to end.
    chunk : int
        Tokens of one forward.
    haystack : tuple of int, optional
        Token ids of a text to hide it in, of the greatest length; None: sentences that say nothing.
    """

    lengths: tuple[int, ...] = (4096, 8192)
    digits: tuple[int, ...] = (7, 64)
    samples: int = 5
    chunk: int = 512
    haystack: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("lengths", "digits"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) != len(values):
                raise ConfigurationError(f"{name} must be whole numbers from 1 on, each once, not {values}")
        for name in ("samples", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")

    def needle(self, tokenizer: Any, length: int, digits: int, sample: int) -> Needle:
        """Return one of the texts: the same for every way to read."""
        depth = (sample + 0.5) / self.samples
        return passkey(tokenizer, length, depth=depth, digits=digits, seed=sample, haystack=self.haystack)


@dataclass(frozen=True)
class Found:
    """What became of one text.

    Attributes
    ----------
    way : str
        How it was read.
    length, digits, sample : int
        Which text.
    depth : float
        Where the passkey stands in it.
    is_found : bool
        Whether the passkey was told, whole.
    told : float
        Share of its digits told before the first mistake.
    answer : Answer
        What was written, and what that took.
    """

    way: str
    length: int
    digits: int
    sample: int
    depth: float
    is_found: bool
    told: float
    answer: Answer

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Found:
        """Return what :meth:`as_json` was made of."""
        return cls(**{**values, "answer": Answer(**values["answer"])})


@dataclass(frozen=True)
class FoundShare:
    """What one way to read found of the texts of one length.

    Attributes
    ----------
    way : str
        How they were read.
    length, digits : int
        Of the texts, and their passkeys.
    found : Interval
        Share of the passkeys told, whole.
    told : float
        Mean share of digits told before the first mistake.
    read, seen, forgotten, bytes, tokens_per_second, decode_ms
        Medians of what :class:`~everlong.evaluation.long_inputs.Answer` says; bytes by tier.
    """

    way: str
    length: int
    digits: int
    found: Interval
    told: float
    read: int
    seen: int
    forgotten: int
    bytes: dict[str, int]
    tokens_per_second: float
    decode_ms: float


def look_for_passkeys(loaded: LoadedModel, ways: Sequence[Way], plan: PasskeyPlan) -> Iterator[Found]:
    """Let each way read each text; shorter ones first.

    Raises
    ------
    ConfigurationError
        A passkey does not fit into a length; said before anything is read.
    InputError
        The text to hide it in is too short; said before, too.
    """
    kinds = [(length, digits) for length in sorted(plan.lengths) for digits in plan.digits]
    for length, digits in kinds:
        plan.needle(loaded.tokenizer, length, digits, 0)
    for length, digits in kinds:
        for way in ways:
            for sample in range(plan.samples):
                yield look(loaded, way, plan, length, digits, sample)


def look(loaded: LoadedModel, way: Way, plan: PasskeyPlan, length: int, digits: int, sample: int) -> Found:
    """Let one way read one text."""
    needle = plan.needle(loaded.tokenizer, length, digits, sample)
    given = answer(loaded, way, needle, chunk=plan.chunk)
    is_found, told = needle.is_told(given.text), needle.told(given.text)
    return Found(way.name, length, digits, sample, needle.depth, is_found, told, given)


def shares(found: Sequence[Found]) -> list[FoundShare]:
    """Put the texts of one way and kind together, in the order in which these come first."""
    kinds: dict[tuple[str, int, int], list[Found]] = {}
    for one in found:
        kinds.setdefault((one.way, one.length, one.digits), []).append(one)
    return [_share(*kind, some) for kind, some in kinds.items()]


def _share(way: str, length: int, digits: int, some: Sequence[Found]) -> FoundShare:
    answers = [one.answer for one in some]
    tiers = dict.fromkeys(tier for each in answers for tier in each.bytes)
    return FoundShare(
        way,
        length,
        digits,
        share_interval(sum(one.is_found for one in some), len(some)),
        fmean(one.told for one in some),
        int(median(each.read for each in answers)),
        int(median(each.seen for each in answers)),
        int(median(each.forgotten for each in answers)),
        {tier: int(median(each.bytes.get(tier, 0) for each in answers)) for tier in tiers},
        median(each.read / each.seconds for each in answers),
        median(each.decode_ms for each in answers),
    )
