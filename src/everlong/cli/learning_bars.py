"""How far learning has come, shown as it happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from everlong.memory.progress import LearnProgress

_WORDS = {"elicit": "asking", "teach": "answering", "learn": "learning", "done": "learned"}


@contextmanager
def learning_bars(console: Console) -> Iterator[Any]:
    """Show how far learning has come; yields what ``memorize`` takes as ``progress=``."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        *(TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn()),
        *(TextColumn("{task.fields[note]}"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("learning", total=1.0, note="")
        shown: tuple[Any, ...] = ()

        def report(at: LearnProgress) -> None:
            nonlocal shown
            title, note = f"segment {at.segment + 1} of {at.segments}: {_WORDS[at.stage]}", pairs_in_words(at)
            bars.update(task, completed=at.fraction, description=title, note=note)
            if not console.is_terminal and (at.segment, at.stage) != shown:
                shown = (at.segment, at.stage)
                console.print(f"{title}; {note}, {at.tokens_per_second:.1f} tokens/s", soft_wrap=True)

        yield report


def stage_in_words(at: LearnProgress) -> str:
    """Return what is being done with a segment."""
    return f"segment {at.segment + 1}: {_WORDS[at.stage]}"


def pairs_in_words(at: LearnProgress) -> str:
    """Return how many pairs are kept, and the loss."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in at.dropped.items())
    loss = "" if at.loss is None else f", loss {at.loss:.3f}"
    return f"{at.kept} of {at.pairs} pairs{f' ({dropped})' if dropped else ''}{loss}"
