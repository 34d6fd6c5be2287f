"""How methods read and write, shown as it happens: a bar while one reads, then the text it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from everlong.cli.learning_bars import pairs_in_words, stage_in_words
from everlong.models.files import human_bytes

if TYPE_CHECKING:
    from everlong.memory.progress import LearnProgress
    from everlong.reading.reports import Progress

_STEPS = 4  # lines per method where there is no terminal to draw a bar in


class ReadingBars:
    """Shows methods one after another. Its methods are the callbacks of ``compare_methods``.

    Parameters
    ----------
    console : Console
        Where; a quiet one shows nothing.
    show_text : bool
        Whether to show what the methods write.
    """

    def __init__(self, console: Console, *, show_text: bool = False) -> None:
        self._console = console
        self._show_text = show_text and not console.quiet
        self._bars: Bars | None = None
        self._task: Any = None
        self._name = ""
        self._writes = False
        self._shown = 0
        self._learning = ""  # what was printed of it last

    def __enter__(self) -> ReadingBars:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_line()
        self._stop()

    def reading(self, name: str, at: Progress) -> None:
        """Show how far `name` has read."""
        if name != self._name:
            self._end_line()
            self._stop()
            self._name, self._shown = name, 0
            if self._console.is_terminal and not self._console.quiet:
                self._bars = _bars(self._console)
                self._task = self._bars.add_task(name, total=at.total, note="")
                self._bars.start()
        perplexity = "" if at.perplexity is None else f", perplexity {at.perplexity:,.1f}"
        note = f"{at.tokens_per_second:,.0f} tokens/s{perplexity}, {human_bytes(sum(at.bytes.values()))} held"
        if self._bars is not None:
            self._bars.update(self._task, completed=at.tokens, note=note)
        elif at.total and at.tokens * _STEPS // at.total > self._shown:
            self._shown = at.tokens * _STEPS // at.total
            self._console.print(f"{name}: {at.tokens:,} of {at.total:,} tokens, {note}", soft_wrap=True)

    def learning(self, name: str, at: LearnProgress) -> None:
        """Show how far what left the window of `name` is learned."""
        words, pairs = stage_in_words(at), pairs_in_words(at)
        if self._bars is not None:
            self._bars.update(self._task, note=f"{words}; {pairs}")
        elif words != self._learning:
            self._learning = words
            self._console.print(f"{name}: {words}; {pairs}", markup=False, soft_wrap=True)

    def writing(self, name: str, piece: str) -> None:
        """Show a piece of what `name` writes."""
        self._stop()
        if not self._show_text:
            return
        if not self._writes:
            self._writes = True
            self._console.print(f"\n[bold]{name}[/] goes on writing:", style="cyan")
        self._console.out(piece, end="", highlight=False)
        self._console.file.flush()

    def _end_line(self) -> None:
        if self._writes:
            self._console.print("\n")
        self._writes = False

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
