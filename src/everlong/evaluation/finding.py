"""Tasks in texts of several lengths, under several ways to read: who finds what is asked for."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from everlong.errors import ConfigurationError
from everlong.evaluation.kept import KeptRows
from everlong.evaluation.long_inputs import Answer, Way, answer
from everlong.evaluation.needles import Passkey
from everlong.evaluation.statistics import Interval, share_interval
from everlong.evaluation.tasks import Sample, Task
from everlong.evaluation.texts import check_lengths
from everlong.models.loading import LoadedModel


@dataclass(frozen=True)
class FindingPlan:
    """What is to be found, in which texts.

    Attributes
    ----------
    tasks : tuple of Task
        Kinds of texts.
    lengths : tuple of int
        Tokens of text and question together.
    samples : int
        Texts of each kind and length, each drawn anew, at depths spread evenly from beginning to end.
    chunk : int
        Tokens of one forward.
    """

    tasks: tuple[Task, ...] = (Passkey(), Passkey(digits=64))
    lengths: tuple[int, ...] = (4096, 8192)
    samples: int = 5
    chunk: int = 512

    def __post_init__(self) -> None:
        check_lengths(self.lengths)
        labels = [task.label for task in self.tasks]
        if not labels or len(set(labels)) != len(labels):
            raise ConfigurationError(f"name each of the tasks once, and at least one: {', '.join(labels)}")
        for name in ("samples", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {getattr(self, name)}")

    def sample(self, tokenizer: Any, task: Task, length: int, number: int) -> Sample:
        """Return one of the texts: the same for every way to read."""
        return task.sample(tokenizer, length, depth=(number + 0.5) / self.samples, seed=number)

    def check(self, tokenizer: Any, ways: Sequence[Way] = ()) -> None:
        """Refuse what cannot work before anything is read.

        Parameters
        ----------
        tokenizer : transformers.PreTrainedTokenizerBase
            The model's.
        ways : sequence of Way
            How texts are to be read.

        Raises
        ------
        ConfigurationError
            A task does not fit into a length, or a question into what a way cuts texts to.
        InputError
            What a text is to be made of is missing, or too short.
        """
        for task in self.tasks:
            for length in self.lengths:
                for number in range(self.samples):
                    sample = self.sample(tokenizer, task, length, number)
                    for way in ways:
                        way.kept(sample)


@dataclass(frozen=True)
class Found:
    """What became of one text.

    Attributes
    ----------
    way : str
        How it was read.
    task : str
        What kind it is of: the task's label.
    length, sample : int
        Which text.
    depth : float or None
        Where in it stands what was asked for; None: in several places.
    is_found : bool
        Whether all of it was told.
    told : float
        Share of it that was. Of a passkey: of its digits, before the first mistake.
    answer : Answer
        What was written, and what that took.
    expected : tuple of str
        What was asked for.
    is_query_aware : bool
        Whether the way to read knew the question when it chose what to keep.
    """

    way: str
    task: str
    length: int
    sample: int
    depth: float | None
    is_found: bool
    told: float
    answer: Answer
    expected: tuple[str, ...] = ()
    is_query_aware: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Found:
        """Return what :meth:`as_json` was made of."""
        expected = tuple(values.get("expected", ()))
        return cls(**{**values, "answer": Answer(**values["answer"]), "expected": expected})


@dataclass(frozen=True)
class FoundShare:
    """What one way to read found in the texts of one kind and length.

    Attributes
    ----------
    way, task : str
        How they were read, and of what kind they are.
    length : int
        Of the texts.
    found : Interval
        Share of the texts of which all was told.
    told : Interval
        Mean share of what was asked for that was told.
    is_query_aware : bool
        As of :class:`Found`.
    read, seen, forgotten, bytes, seconds, tokens_per_second, decode_ms
        Medians of what :class:`~everlong.evaluation.long_inputs.Answer` says; bytes by tier.
    """

    way: str
    task: str
    length: int
    found: Interval
    told: Interval
    is_query_aware: bool
    read: int
    seen: int
    forgotten: int
    bytes: dict[str, int]
    seconds: float
    tokens_per_second: float
    decode_ms: float


def find(
    loaded: LoadedModel, ways: Sequence[Way], plan: FindingPlan, kept: KeptRows | None = None
) -> Iterator[Found]:
    """Let each way read each text; shorter ones first.

    Parameters
    ----------
    loaded : LoadedModel
        The model, detached, with its tokenizer.
    ways : sequence of Way
        How it reads.
    plan : FindingPlan
        What it reads.
    kept : KeptRows, optional
        Where what was found is kept. What is there already is not read again.

    Raises
    ------
    ConfigurationError
        A task does not fit into a length; said before anything is read.
    InputError
        The text to hide something in is too short; said before, too.
    """
    plan.check(loaded.tokenizer, ways)
    for length in sorted(plan.lengths):
        for task in plan.tasks:
            for way in ways:
                for number in range(plan.samples):
                    key = row_key(way, plan, task, length, number)
                    if kept is not None and key in kept:
                        yield Found.restored(kept.rows[key])
                        continue
                    found = look(loaded, way, plan, task, length, number)
                    if kept is not None:
                        kept.add(key, found.as_json())
                    yield found


def look(loaded: LoadedModel, way: Way, plan: FindingPlan, task: Task, length: int, number: int) -> Found:
    """Let one way read one text."""
    sample = plan.sample(loaded.tokenizer, task, length, number)
    given = answer(loaded, way, sample, chunk=plan.chunk)
    is_found, told = sample.is_told(given.text), sample.told(given.text)
    return Found(
        way.name,
        task.label,
        length,
        number,
        sample.depth,
        is_found,
        told,
        given,
        sample.expected,
        way.is_query_aware,
    )


def row_key(way: Way, plan: FindingPlan, task: Task, length: int, number: int) -> str:
    """Return what tells a text and how it is read from all others of a model: changed, it is read anew.

    A policy of one's own is told by the file that it stands in, too.
    """
    which = f"{length} tokens, {number + 1} of {plan.samples}"
    return f"{way_key(way, plan.chunk)}; {task.label} [{task.key}]; {which}"


def way_key(way: Way, chunk: int) -> str:
    """Return what tells a way to read, so many tokens at a time, from all others."""
    how = hashlib.sha256(f"{(way, chunk)!r}{_own_source(way)}".encode()).hexdigest()[:12]
    return f"{way.name} [{how}]"


def _own_source(way: Way) -> str:
    """Return what a policy's file holds, where that is none of ours."""
    kind = type(way.policy)
    if way.policy is None or kind.__module__.split(".")[0] == "everlong":
        return ""
    try:
        return Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return ""


def shares(found: Sequence[Found]) -> list[FoundShare]:
    """Put the texts of one way, kind and length together, in the order in which these come first."""
    kinds: dict[tuple[str, str, int], list[Found]] = {}
    for one in found:
        kinds.setdefault((one.way, one.task, one.length), []).append(one)
    return [_share(*kind, some) for kind, some in kinds.items()]


def _share(way: str, task: str, length: int, some: Sequence[Found]) -> FoundShare:
    answers = [one.answer for one in some]
    tiers = dict.fromkeys(tier for each in answers for tier in each.bytes)
    return FoundShare(
        way,
        task,
        length,
        share_interval(sum(one.is_found for one in some), len(some)),
        share_interval(sum(one.told for one in some), len(some)),
        any(one.is_query_aware for one in some),
        int(median(each.read for each in answers)),
        int(median(each.seen for each in answers)),
        int(median(each.forgotten for each in answers)),
        {tier: int(median(each.bytes.get(tier, 0) for each in answers)) for tier in tiers},
        median(each.seconds for each in answers),
        median(each.read / each.seconds for each in answers),
        median(each.decode_ms for each in answers),
    )
