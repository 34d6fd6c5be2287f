"""A comparison as a table for the terminal, as JSON, and as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from everlong.errors import InputError
from everlong.evaluation.comparison import Comparison, MethodResult
from everlong.evaluation.resources import machine_line
from everlong.models.files import human_bytes

_AHEAD = "*"
_WHY = "a little too good: queries of a group recall together, so earlier ones gain from later ones"
_MUCH_WORSE = 2.0  # times the best perplexity of a row: shown in red


def table(comparison: Comparison) -> RenderableType:
    """Return the comparison as a rich table, one column per method, with a line on the machine below."""
    shown = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, pad_edge=False, show_edge=False)
    shown.add_column("perplexity of tokens", no_wrap=True)
    for result in comparison.results:
        shown.add_column(_heading(result), justify="right", no_wrap=True)
    length, until = comparison.training_length, comparison.trained_until
    is_beyond = False
    for index, bucket in enumerate(comparison.results[0].buckets):
        if until is not None and bucket.start >= until and not is_beyond:
            is_beyond = True
            shown.add_row(f"[dim]past training ({length:,})[/]")
        row = [result.buckets[index].perplexity for result in comparison.results]
        shown.add_row(f"{bucket.start:>7,} to {bucket.stop:,}", *_marked(row))
    shown.add_section()
    for title, show in _ROWS:
        shown.add_row(title, *(show(result) for result in comparison.results))
    pinned = f"; {comparison.pinned:,} tokens pinned" if comparison.pinned else ""
    below = [f"{comparison.model}{pinned}; {machine_line(comparison.machine)}"]
    if any(result.looks_ahead for result in comparison.results):
        below.insert(0, f"{_AHEAD} {_WHY}")
    return Group(shown, "", *(Text(line, style="dim") for line in below))


def save_json(comparison: Comparison, path: Path) -> None:
    """Write the comparison to `path` as JSON."""
    _write(path, (json.dumps(comparison.as_json(), indent=1, ensure_ascii=False) + "\n").encode())


def save_png(comparison: Comparison, path: Path) -> None:
    """Draw perplexity, tokens per second and bytes held, by position, side by side, into `path`."""
    from everlong.evaluation.picture import draw

    _write(path, draw(comparison))


def _heading(result: MethodResult) -> str:
    window = result.options.get("window")
    mark = _AHEAD if result.looks_ahead else ""
    return f"{result.name}{mark}\n[dim]{f'window {window:,}' if window else 'no window'}[/]"


def _marked(row: list[float]) -> list[str]:
    best = min(row)
    return [
        f"[bold red]{_number(value)}[/]" if value > _MUCH_WORSE * best else _number(value) for value in row
    ]


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


_ROWS: list[tuple[str, Callable[[MethodResult], str]]] = [
    ("reading, tokens/s", lambda result: f"{result.tokens_per_second:,.0f}"),
    ("   at the end", lambda result: f"{result.last_tokens_per_second:,.0f}"),
    ("writing, ms/token", lambda result: _milliseconds(result.decode_ms)),
    ("state held", lambda result: human_bytes(sum(result.bytes.values()))),
    ("tokens kept", lambda result: f"{result.kept:,}"),
    ("tokens forgotten", lambda result: f"{result.forgotten:,}"),
]


def _milliseconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.1f}"


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; choose another folder with --output"
        ) from error
