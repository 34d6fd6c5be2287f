"""A speed report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from everlong.evaluation.resources import machine_line
from everlong.evaluation.speed_report import DepthSpeed, Side, SpeedReport
from everlong.models.files import human_bytes

Show = Callable[[DepthSpeed], str]


def speed_table(report: SpeedReport) -> RenderableType:
    """Return the report as a rich table, one column per depth, with the two rooflines below."""
    shown = Table(box=SIMPLE_HEAD, header_style="bold", padding=0, pad_edge=False, show_edge=False)
    shown.add_column("tokens of context", no_wrap=True)
    for row in report.rows:
        shown.add_column(f"{row.depth:>11,}", justify="right", no_wrap=True)
    ours = report.policy or "ours"
    for section in (_against_stock(ours), _against_machine(ours) if report.work.is_complete else []):
        for title, show in section:
            shown.add_row(title, *(show(row) for row in report.rows))
        shown.add_section()
    return Group(shown, "", *(Text(line, style="dim") for line in (*_rooflines(report), *_remarks(report))))


def _against_stock(ours: str) -> list[tuple[str, Show]]:
    return [
        *_three("writing, ms/token", ours, lambda side: f"{side.decode_ms:,.1f}", _decode_ratio),
        *_three(
            "reading, tokens/s", ours, lambda side: f"{side.prefill_tokens_per_second:,.0f}", _prefill_ratio
        ),
        *_three("state held", ours, lambda side: human_bytes(side.bytes), _bytes_ratio),
    ]


def _three(what: str, ours: str, show: Callable[[Side], str], ratio: Show) -> list[tuple[str, Show]]:
    return [
        (f"{what}: stock", lambda row: show(row.stock)),
        (f"   {ours}", lambda row: show(row.ours)),
        ("   [bold]ratio[/]", lambda row: f"[bold]{ratio(row)}[/]"),
    ]


def _decode_ratio(row: DepthSpeed) -> str:
    return _times(row.stock.decode_ms / row.ours.decode_ms)


def _prefill_ratio(row: DepthSpeed) -> str:
    return _times(row.ours.prefill_tokens_per_second / row.stock.prefill_tokens_per_second)


def _bytes_ratio(row: DepthSpeed) -> str:
    return _times(row.stock.bytes / row.ours.bytes)


def _against_machine(ours: str) -> list[tuple[str, Show]]:
    return [
        ("reading, of the matrix rate: stock", lambda row: _percent(row.stock.prefill_share)),
        (f"   {ours}", lambda row: _percent(row.ours.prefill_share)),
        (f"writing, {ours}: its kernels alone, ms", lambda row: f"{1000 * row.floor.step:.1f}"),
        ("      products", lambda row: f"{1000 * row.floor.products:.1f}"),
        ("      attention to the window", lambda row: f"{1000 * row.floor.window:.1f}"),
        ("      head", lambda row: f"{1000 * row.floor.head:.1f}"),
        ("   [bold]the step, in times of that[/]", lambda row: f"[bold]{_times(row.step_to_floor)}[/]"),
        ("   at the memory bus's rate, ms", lambda row: f"{row.bus_ms:.1f}"),
        ("   the step, in times of that", lambda row: _times(row.ours.decode_ms / row.bus_ms)),
    ]


def _times(ratio: float) -> str:
    return f"{ratio:,.1f}x" if ratio >= 10 else f"{ratio:.2f}x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _rooflines(report: SpeedReport) -> list[str]:
    """Say what the machine can do, as measured at the last depth."""
    if not report.rows:
        return []
    row, work = report.rows[-1], report.work
    rate = f"matrix rate: {row.matrix_flops / 1e9:,.0f} GFLOP/s, a product of two matrices in {report.dtype}"
    bus = f"memory bus: {row.bandwidth / 1e9:.1f} GB/s, summing up a large buffer"
    if work.is_complete:
        products = row.matrix_flops / (2 * work.weights)
        rate += f"; reading would be {products:,.0f} tokens/s if it were this model's products alone"
        what = f"{human_bytes(row.decode_bytes)} of weights and window"
        bus += f"; a step reads {what}, in {row.bus_ms:.1f} ms at that rate"
    return [rate, bus]


def _remarks(report: SpeedReport) -> list[str]:
    window = report.options.get("window")
    how = f"window {window:,}, full at every depth" if window else "no window"
    lines = [f"{report.model}, {report.dtype} on {report.device}, our weights {report.weights}; {how}"]
    lines += [
        f"unfinished: {row.repeats} of {report.plan.repeats} repeats at {row.depth:,}"
        for row in report.rows
        if row.repeats < report.plan.repeats
    ]
    if missing := report.plan.depths[len(report.rows) :]:
        lines.append(f"not reached: {', '.join(f'{depth:,}' for depth in missing)}")
    if not report.work.is_complete:
        lines.append("its experts are not linear layers: what it multiplies and reads cannot be counted")
    allocated = [row.ours.allocated for row in report.rows if row.ours.allocated is not None]
    if allocated:
        lines.append(f"filling our window took {human_bytes(allocated[-1])} of the device's memory")
    return [*lines, machine_line(report.machine)]
