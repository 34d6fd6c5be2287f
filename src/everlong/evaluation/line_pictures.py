"""Pictures of lines, one for each way to read, in panels side by side; for pages of either brightness."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from everlong.evaluation.finding_pictures import INK, as_png, finish_panel, new_figure, short

_COLOURS = ("#3b7fb5", "#c0392b", "#2a9d8f", "#8e5bb5", "#d98a29", "#7f8c8d", "#b8577f")
_DASHES = ("-", "--", ":", "-.")
_FEW_LABELS = 20  # from this ratio on, powers of ten are labels enough


@dataclass(frozen=True)
class Line:
    """A line of a panel.

    Attributes
    ----------
    name : str
        What it is of; lines of the same name look the same in all panels.
    x, y : tuple of float
        Its points.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Panel:
    """A panel of a picture.

    Attributes
    ----------
    title, x_title : str
        What is drawn, over what.
    lines : tuple of Line
        At least one.
    is_log, has_zero : bool
        Whether heights go by powers of ten; whether they begin at 0, where they do not.
    ticks : tuple of int
        Numbers of tokens that the lower edge names; empty: it chooses.
    mark : float or None
        Where a vertical line stands.
    mark_name : str
        What that is.
    """

    title: str
    x_title: str
    lines: tuple[Line, ...]
    is_log: bool = False
    has_zero: bool = True
    ticks: tuple[int, ...] = ()
    mark: float | None = None
    mark_name: str = ""


def draw_lines(panels: Sequence[Panel], *, dark: bool) -> bytes:
    """Return a PNG of panels side by side, with one legend."""
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    handles: dict[str, Any] = {}  # by name: matplotlib's own list leaves out names that begin with _
    figure = new_figure((2.2 + 4.6 * len(panels), max(3.0, 0.6 + 0.19 * len(names))))
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for line in panel.lines:
            at = names.index(line.name)
            (handles[line.name],) = axes.plot(
                line.x,
                line.y,
                _DASHES[at // len(_COLOURS) % len(_DASHES)],
                marker="o",
                ms=3,
                lw=1.4,
                color=_COLOURS[at % len(_COLOURS)],
            )
        if panel.is_log:
            _by_powers(axes)
        elif panel.has_zero:
            axes.set_ylim(bottom=0)
        if panel.mark is not None:
            axes.axvline(panel.mark, color=INK[dark], lw=0.8, ls="--", alpha=0.5)
            place, offset = (panel.mark, 1), (3, -9)
            axes.annotate(
                panel.mark_name,
                place,
                xycoords=("data", "axes fraction"),
                xytext=offset,
                textcoords="offset points",
                fontsize=7,
                color=INK[dark],
            )
        axes.grid(alpha=0.25)
        if panel.ticks:
            axes.set_xscale("log", base=2)
            axes.set_xticks(panel.ticks, [short(tick) for tick in panel.ticks], minor=False)
            axes.set_xticks([], minor=True)
        else:
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(panel.x_title, fontsize=8, color=INK[dark])
        finish_panel(axes, panel.title, dark)
        axes.tick_params(which="minor", labelsize=7, colors=INK[dark], length=2)
    legend = figure.legend(
        [handles[name] for name in names],
        names,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        labelcolor=INK[dark],
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return as_png(figure)


def _by_powers(axes: Any) -> None:
    from matplotlib.ticker import NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    labels = "{x:g}" if high < _FEW_LABELS * low else NullFormatter()
    axes.yaxis.set_minor_formatter(labels)
