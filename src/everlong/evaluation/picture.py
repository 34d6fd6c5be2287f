"""The picture of a comparison: three panels over the position in the text."""

from __future__ import annotations

import io
from typing import Any

from everlong.evaluation.comparison import Comparison

_COLOURS = ("#c0392b", "#1f77b4", "#2a9d5c", "#8e5bb5", "#d98a29", "#5d6d7e")
_BEYOND = "#f3f3f3"
_FEW_LABELS = 20  # from this ratio on, powers of ten are labels enough


def draw(comparison: Comparison) -> bytes:
    """Return a PNG: perplexity, tokens per second and bytes held, by position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    perplexity, speed, held = figure.subplots(1, 3)
    for result, colour in zip(comparison.results, _cycle(len(comparison.results)), strict=True):
        at = [(bucket.start + bucket.stop) / 2 for bucket in result.buckets]
        perplexity.plot(
            at, [b.perplexity for b in result.buckets], "o-", ms=3.5, color=colour, label=result.name
        )
        perplexity.fill_between(
            at,
            [b.low for b in result.buckets],
            [b.high for b in result.buckets],
            color=colour,
            alpha=0.15,
            lw=0,
        )
        ends = [chunk.stop for chunk in result.chunks]
        speed.plot(ends, [chunk.tokens / chunk.seconds for chunk in result.chunks], color=colour, lw=1.5)
        held.plot(ends, [chunk.bytes / 2**20 for chunk in result.chunks], color=colour, lw=1.5)
    perplexity.set_yscale("log")
    low, high = perplexity.get_ylim()
    perplexity.yaxis.set_major_formatter("{x:g}")
    perplexity.yaxis.set_minor_formatter("{x:g}" if high < _FEW_LABELS * low else NullFormatter())
    for panel, title in (
        (perplexity, "perplexity (lower is better)"),
        (speed, "tokens read per second"),
        (held, "state held, MiB"),
    ):
        _finish(panel, title, comparison)
    speed.set_ylim(bottom=0)
    held.set_ylim(bottom=0)
    perplexity.legend(frameon=False)
    figure.suptitle(f"{comparison.model} reads {comparison.text}", fontsize=11)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=130)
    return target.getvalue()


def _finish(panel: Any, title: str, comparison: Comparison) -> None:
    panel.set_title(title, loc="left", fontsize=10)
    panel.set_xlabel("position in the text, tokens", fontsize=9)
    panel.set_xlim(0, comparison.tokens)
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.tick_params(labelsize=8, which="both")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    length = comparison.trained_until
    if length is not None and length < comparison.tokens:
        panel.axvspan(length, comparison.tokens, color=_BEYOND, zorder=0)
        panel.axvline(length, color="#888888", lw=1, ls="--")
        panel.annotate(
            "training length",
            (length, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -9),
            textcoords="offset points",
            fontsize=7,
            color="#666666",
        )


def _cycle(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]
