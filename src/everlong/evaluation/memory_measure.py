"""What measures of the long-term memory share: how they ask, and an unrelated text on which forgetting shows.

:mod:`~everlong.evaluation.stored_memories` asks memories of a store with what they were learned from,
:mod:`~everlong.evaluation.invented_facts` learns documents of invented facts on the spot.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from everlong.errors import InputError
from everlong.evaluation.forgetting import Standing, standing
from everlong.evaluation.grounded import cloze
from everlong.evaluation.long_inputs import Way
from everlong.evaluation.measures import Measure, Section, Step
from everlong.evaluation.memory_section import memory_section
from everlong.evaluation.probes import Probe
from everlong.evaluation.recall import Recall, recall
from everlong.evaluation.texts import LIBRARY, check_text, digest, haystack
from everlong.memory.folder import Memory
from everlong.models.loading import LoadedModel

ASKING = 40
"""Tokens read in the time that a probe takes, in a batch."""

_TASK = 20  # words left out of the unrelated text
_FEWEST = 64  # tokens of it, below which an interval says nothing
_SHORT = 12  # tokens that an answer may have at least
_BEYOND = 2  # tokens more than the longest answer that is right


@dataclass(frozen=True)
class Aside:
    """The unrelated text, and words left out of it.

    Attributes
    ----------
    name, text : str
        What it is called, and what it is.
    probes : list of Probe
        The words.
    """

    name: str
    text: str
    probes: list[Probe]

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.name} [{digest(self.text + repr(self.probes))}]"

    @property
    def cost(self) -> int:
        """What a model is measured on it in the time of, in tokens read, about."""
        return len(self.text) // 3 + len(self.probes) * ASKING

    def measured(self, loaded: LoadedModel) -> dict[str, Any]:
        """Return how a model does on it, as it is kept."""
        found: Standing = standing(loaded.model, loaded.tokenizer, self.text, self.probes)
        return {
            "text": self.name,
            "surprisal": _rounded(found.surprisal),
            "task": kept_answers(found.recall),
        }


@dataclass(frozen=True)
class MemoryMeasure(Measure):
    """What both kinds share: an unrelated text, on which forgetting shows.

    Parameters
    ----------
    text : str
        A file, or ``"library"``: Python's own sources; unrelated to what was learned.
    tokens : int
        Of it that are scored, from its beginning.
    seed : int
        Of what is drawn.
    """

    name: ClassVar[str] = "memory"
    has_ways: ClassVar[bool] = False

    text: str = LIBRARY
    tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        check_text(self.text)

    def steps(self, loaded: LoadedModel, ways: Sequence[Way]) -> list[Step]:
        """Return those of the model as it is, and of each memory."""
        excerpt = haystack(loaded.tokenizer, self.text, self.tokens)
        unrelated = str(loaded.tokenizer.decode(excerpt.ids, skip_special_tokens=True))
        aside = Aside(excerpt.name, unrelated, cloze(unrelated, _TASK, self.seed))
        if not aside.probes:
            raise InputError(f"{excerpt.name} has no sentence to leave a word out of: name a longer --text")
        if len(excerpt.ids) < _FEWEST:
            raise InputError(
                f"{excerpt.name} has {len(excerpt.ids)} tokens, fewer than {_FEWEST}, of which no loss could "
                "be told: name a longer --text"
            )
        first = Step(
            f"memory; unrelated; {aside.key}",
            f"loss on {excerpt.name}, nothing learned",
            len(excerpt.ids) + _TASK * ASKING,
            lambda _: {"standing": aside.measured(loaded)},
        )
        return [first, *self._steps(loaded, aside)]

    @abstractmethod
    def _steps(self, loaded: LoadedModel, aside: Aside) -> list[Step]:
        """Return those of each memory."""

    def section(self, rows: Sequence[dict[str, Any]]) -> Section:
        """Return what was recalled, and what was lost of the unrelated text."""
        return memory_section(self.name, rows)


def asked(loaded: LoadedModel, probes: Sequence[Probe], **before: str) -> list[dict[str, Any]]:
    """Return what a model answers, as sessions ask it, as it is kept; `before` as of :func:`recall`."""
    most = most_tokens(loaded.tokenizer, probes)
    model, tokenizer = loaded.model, loaded.tokenizer
    return kept_answers(
        recall(model, tokenizer, probes, max_new_tokens=most, in_turns=True, **before)  # type: ignore[arg-type]
    )


def most_tokens(tokenizer: Any, probes: Sequence[Probe]) -> int:
    """Return how many tokens an answer may have: a little more than the longest that is right."""
    longest = (
        len(tokenizer.encode(f" {answer}", add_special_tokens=False))
        for probe in probes
        for answer in probe.answers
    )
    return max(_SHORT, max(longest, default=0) + _BEYOND)


def probes_key(tokenizer: Any, probes: Sequence[Probe]) -> str:
    """Return what tells probes, and how long an answer may be, from all others."""
    return digest(f"{list(probes)!r}, {most_tokens(tokenizer, probes)} tokens")


def kept_answers(found: Recall) -> list[dict[str, Any]]:
    """Return answers as they are kept."""
    return [
        {
            "form": each.probe.form,
            "prompt": each.probe.prompt,
            "answers": list(each.probe.answers),
            "written": each.text,
        }
        for each in found.answered
    ]


def account(memory: Memory) -> dict[str, Any]:
    """Return what a memory took, as it is kept."""
    record = memory.record
    return {
        "kind": record.kind if record.rank is None else f"{record.kind}, rank {record.rank}",
        "tokens": record.source.tokens,
        "pairs": len(memory.pairs()),
        "seconds": record.seconds,
        "bytes": memory.bytes,
    }


def _rounded(surprisal: Tensor) -> list[float]:
    return [round(value, 4) for value in surprisal.tolist()]
