"""How far learning has come, shown as it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from everlong.cli.terminal import duration

if TYPE_CHECKING:
    from everlong.memory.progress import LearnProgress

_WORDS = {
    "elicit": "asking",
    "teach": "answering",
    "write": "writing on",
    "learn": "learning",
    "done": "learned",
}


@contextmanager
def learning_bars(console: Console) -> Iterator[Any]:
    """Show how far learning has come; yields what ``memorize`` takes as ``progress=``."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("learning", total=1.0, note="")
        shown: tuple[Any, ...] = ()

        def report(at: LearnProgress) -> None:
            nonlocal shown
            title = f"segment {at.segment + 1} of {at.segments}: {_WORDS[at.stage]}"
            note = f"{pairs_in_words(at)}, {_pace_in_words(at)}"
            bars.update(task, completed=at.fraction, description=title, note=note)
            if not console.is_terminal and (at.segment, at.stage) != shown:
                shown = (at.segment, at.stage)
                console.print(f"{title}; {note}", soft_wrap=True)

        yield report


def stage_in_words(at: LearnProgress) -> str:
    """Return what is being done with a segment."""
    return f"segment {at.segment + 1}: {_WORDS[at.stage]}"


def pairs_in_words(at: LearnProgress) -> str:
    """Return how many pairs are kept, what they do not cover, and the loss."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in at.dropped.items())
    parts = [f"{at.kept} of {at.pairs} pairs{f' ({dropped})' if dropped else ''}"]
    if at.uncovered:
        parts.append(uncovered_in_words(at.uncovered, at.sentences))
    if at.loss is not None:
        parts.append(f"loss {at.loss:.3f}")
    return ", ".join(parts)


def uncovered_in_words(uncovered: int, sentences: int) -> str:
    """Return how many sentences too few pairs are about."""
    return f"{uncovered} of {sentences} sentences not covered"


def _pace_in_words(at: LearnProgress) -> str:
    left = f", {duration(at.seconds_left)} left" if at.seconds_left else ""
    return f"{at.tokens_per_second:.1f} tokens/s{left}"
