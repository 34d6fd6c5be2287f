"""Pictures of who found what: heat maps over length and depth, and bars, for pages of either brightness."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from everlong.evaluation.finding import Found, FoundShare
from everlong.evaluation.statistics import Interval

INK = {False: "#222222", True: "#dddddd"}
_PANELS = 5  # in a row
_LENGTHS = ("#7fb2d9", "#3b7fb5", "#2a9d8f", "#8e5bb5", "#c0392b", "#d98a29")


def draw_heat(found: Sequence[Found], *, dark: bool) -> bytes:
    """Return a PNG of one task: a map for each way to read, lengths by depths, and how much was told.

    Parameters
    ----------
    found : sequence of Found
        Of one task that has depths.
    dark : bool
        Whether it is for a dark page; what is behind it is left clear.
    """
    ways = list(dict.fromkeys(one.way for one in found))
    lengths = sorted({one.length for one in found})
    numbers = sorted({one.sample for one in found})
    depths = {one.sample: one.depth for one in found}
    columns = min(_PANELS, len(ways))
    rows = math.ceil(len(ways) / columns)
    size = (1.4 + columns * max(1.6, 0.62 * len(lengths)), 0.6 + rows * max(1.7, 0.6 + 0.28 * len(numbers)))
    figure = new_figure(size)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for at, panel in enumerate(panels.flat):
        if at >= len(ways):
            panel.axis("off")
            continue
        told = [[_mean(found, ways[at], length, number) for length in lengths] for number in numbers]
        panel.imshow(told, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, values in enumerate(told):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    ink = "#111111" if value > 0.6 else "#eeeeee"
                    panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", size=7, color=ink)
        panel.set_xticks(range(len(lengths)), [short(length) for length in lengths])
        panel.set_yticks(range(len(numbers)), [f"{depths[number] or 0:.0%}" for number in numbers])
        finish_panel(panel, ways[at], dark)
    figure.supxlabel("tokens", size=8, color=INK[dark])
    figure.supylabel("depth", size=8, color=INK[dark])
    return as_png(figure)


def draw_bars(every: Sequence[FoundShare], *, dark: bool) -> bytes:
    """Return a PNG: for each task, how much each way told at each length, with intervals of 95 %."""
    tasks = list(dict.fromkeys(share.task for share in every))
    ways = list(dict.fromkeys(share.way for share in every))
    lengths = sorted({share.length for share in every})
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    height = 0.7 + len(ways) * (0.12 + 0.09 * len(lengths))
    figure = new_figure((1.6 + 3 * columns, 0.5 + rows * height))
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    thickness = 0.8 / len(lengths)
    for at, panel in enumerate(panels.flat):
        if at >= len(tasks):
            panel.axis("off")
            continue
        for row, length in enumerate(lengths):
            some = [share for share in every if (share.task, share.length) == (tasks[at], length)]
            panel.barh(
                [ways.index(share.way) + (row - (len(lengths) - 1) / 2) * thickness for share in some],
                [100 * share.told.mean for share in some],
                thickness,
                xerr=[
                    [100 * (share.told.mean - share.told.low) for share in some],
                    [100 * (share.told.high - share.told.mean) for share in some],
                ],
                color=_LENGTHS[row % len(_LENGTHS)],
                error_kw={"ecolor": INK[dark], "lw": 0.7, "alpha": 0.6},
                label=short(length),
            )
        panel.set_yticks(range(len(ways)), ways, parse_math=False)
        panel.set_ylim(len(ways) - 0.5, -0.5)
        panel.set_xlim(0, 103)
        panel.grid(axis="x", alpha=0.25)
        finish_panel(panel, tasks[at], dark)
    figure.legend(
        *panels.flat[0].get_legend_handles_labels(),
        loc="outside upper right",
        ncols=len(lengths),
        frameon=False,
        fontsize=8,
        labelcolor=INK[dark],
    )
    return as_png(figure)


def draw_shares(every: Sequence[tuple[str, Interval]], title: str, *, dark: bool) -> bytes:
    """Return a PNG: named shares as bars in percent, with intervals of 95 %."""
    figure = new_figure((7.0, 0.7 + 0.3 * len(every)))
    axes = figure.subplots()
    names, shares = [name for name, _ in every], [share for _, share in every]
    axes.barh(
        range(len(every)),
        [100 * share.mean for share in shares],
        0.6,
        xerr=[
            [100 * (share.mean - share.low) for share in shares],
            [100 * (share.high - share.mean) for share in shares],
        ],
        color=_LENGTHS[1],
        error_kw={"ecolor": INK[dark], "lw": 0.7, "alpha": 0.6},
    )
    axes.set_yticks(range(len(every)), names, parse_math=False)
    axes.set_ylim(len(every) - 0.5, -0.5)
    axes.set_xlim(0, 103)
    axes.grid(axis="x", alpha=0.25)
    finish_panel(axes, f"{title}: percent right", dark)
    return as_png(figure)


def short(length: int) -> str:
    """Write a number of tokens as people do: 4k is 4,096."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _mean(found: Sequence[Found], way: str, length: int, number: int) -> float:
    told = [one.told for one in found if (one.way, one.length, one.sample) == (way, length, number)]
    return fmean(told) if told else math.nan


def new_figure(size: tuple[float, float]) -> Any:
    """Return a figure of that many inches, with nothing behind it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure


def finish_panel(panel: Any, title: str, dark: bool) -> None:
    """Give a panel its title, and the ink of its page."""
    panel.set_title(title, loc="left", fontsize=8, color=INK[dark], parse_math=False)
    panel.tick_params(labelsize=7, colors=INK[dark], length=2)
    panel.patch.set_alpha(0)
    panel.spines[:].set_visible(False)


def as_png(figure: Any) -> bytes:
    """Return what is drawn."""
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130)
    return target.getvalue()
