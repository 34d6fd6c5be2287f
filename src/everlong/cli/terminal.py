"""What the commands say, and where: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from everlong.models.pulling import OnProgress, PullProgress


def output() -> Console:
    """Return the console of results. Made anew, so that it follows a redirected stream."""
    return Console(file=sys.stdout, soft_wrap=False, highlight=False)


def notes(*, quiet: bool = False) -> Console:
    """Return the console of progress and remarks, on standard error; silent where that was asked for."""
    return Console(file=sys.stderr, highlight=False, quiet=quiet)


def print_json(value: Any) -> None:
    """Print one JSON document to standard output, never coloured or wrapped."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def print_error(message: str) -> None:
    """Print one red line to standard error, whatever line breaks the message has."""
    line = Text(" ".join(message.split()), style="bold red")
    notes().print(line, soft_wrap=True)


def is_interactive() -> bool:
    """Tell whether somebody can be asked: both ends are a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def duration(seconds: float) -> str:
    """Tell a time in a unit that suits it."""
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


@contextmanager
def pull_progress(*, quiet: bool = False) -> Iterator[OnProgress]:
    """Show how a model is fetched and converted; yields what ``load_model`` takes as ``progress=``."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    words = {
        "wait": "waiting for another process that pulls {}",
        "fetch": "fetching {}",
        "check": "checking {}",
        "convert": "converting {} to safetensors (once)",
    }
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    console = notes(quiet=quiet)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(progress: PullProgress) -> None:
            if progress.stage not in tasks:
                for earlier in tasks.values():
                    bars.stop_task(earlier)
                description = words[progress.stage].format(progress.name)
                if not console.is_terminal:
                    console.print(description, style="dim")
                tasks[progress.stage] = bars.add_task(description, total=None)
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total or None)

        yield report
