"""What one run can measure beside what methods find: steps to take, and a section of the report of each.

A measure of one's own is a subclass of :class:`Measure`: it names its steps, each of which gives plain values
that are kept, and makes a section of these. Progress, going on where a run was interrupted, the page and
the JSON beside it are then the same as for the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from everlong.evaluation.kept import KeptRows
from everlong.evaluation.long_inputs import Way
from everlong.models.loading import LoadedModel

OnStep = Callable[[float, str], None]
"""Told how much of a step is done, from 0 to 1, and a remark for people."""


@dataclass(frozen=True)
class Step:
    """A part of a measurement that is kept by itself.

    Attributes
    ----------
    key : str
        What tells it from all others of a model: changed, it is measured anew.
    label : str
        What it is, for people.
    tokens : int
        What it takes, in tokens that the model as it is would read in that time, about.
    run : callable
        Measures, telling how far it is, and returns plain values, which JSON can hold.
    """

    key: str
    label: str
    tokens: int
    run: Callable[[OnStep], dict[str, Any]]


@dataclass(frozen=True)
class Table:
    """Rows of a section.

    Attributes
    ----------
    caption : str
        What they are of.
    headings : tuple of str
        Of the columns.
    rows : tuple of tuple of str
        As they are shown.
    is_detail, is_wide : bool
        Whether the page folds it away; whether it is too wide for a terminal. Neither kind is shown there.
    text_from : int
        The column from which on cells hold sentences.
    """

    caption: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_detail: bool = False
    is_wide: bool = False
    text_from: int = 99


@dataclass(frozen=True)
class Picture:
    """A picture of a section.

    Attributes
    ----------
    draw : callable
        Returns a PNG, for a dark page where it is given True.
    told : str
        What is on it, for those who do not see it.
    """

    draw: Callable[[bool], bytes]
    told: str


@dataclass(frozen=True)
class Section:
    """What a report says of one measure.

    Attributes
    ----------
    name, title : str
        Of the measure, for JSON and for people.
    note : str
        How it was measured, and what its numbers do not say.
    tables : tuple of Table
        Its numbers.
    pictures : tuple of Picture
        What they look like; before the tables.
    values : object
        The numbers, for JSON.
    remark : str
        What marks in the tables mean; shown in the terminal too, where the note is not.
    has_ways : bool
        Whether it is about ways to read; else about the model as it is.
    """

    name: str
    title: str
    note: str
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]
    values: Any
    remark: str = ""
    has_ways: bool = True


class Measure(ABC):
    """Something to measure of a model, and of the ways it reads."""

    name: ClassVar[str]
    has_ways: ClassVar[bool] = True
    """Whether it measures each way to read; else it measures the model as it is."""

    @abstractmethod
    def steps(self, loaded: LoadedModel, ways: Sequence[Way]) -> list[Step]:
        """Return what is to be done, in that order; nothing is measured yet.

        Parameters
        ----------
        loaded : LoadedModel
            The model, detached, with its tokenizer.
        ways : sequence of Way
            How it reads.

        Raises
        ------
        EverlongError
            It cannot be done.
        """

    @abstractmethod
    def section(self, rows: Sequence[dict[str, Any]]) -> Section:
        """Return what the report says of steps that are done, at least one."""


def taken(steps: Sequence[Step], kept: KeptRows | None, on_step: OnStep) -> Iterator[dict[str, Any]]:
    """Take steps in turn, and yield the values of each; those that are kept are not measured again."""
    for step in steps:
        if kept is not None and step.key in kept:
            yield kept.rows[step.key]
            continue
        row = step.run(on_step)
        if kept is not None:
            kept.add(step.key, row)
        yield row


def left(steps: Sequence[Step], kept: KeptRows | None) -> list[Step]:
    """Return the steps of which nothing is kept."""
    return [step for step in steps if kept is None or step.key not in kept]
