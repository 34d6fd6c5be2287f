"""``everlong bench``: how fast this machine reads and writes, and what methods find in long texts."""

from __future__ import annotations

import math
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.grouping import grouped
from everlong.cli.methods_bench import methods
from everlong.cli.options import (
    MethodOptions,
    ModelOptions,
    OutputOptions,
    WeightsOption,
    parse_settings,
)
from everlong.cli.passkeys import niah, passkey
from everlong.cli.policy_files import has_option
from everlong.cli.terminal import notes, output, print_json, pull_progress
from everlong.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from everlong.attention import Policy
    from everlong.evaluation.speed_report import SpeedReport

_WINDOW = 2048
_LEAST = 90  # seconds from which on a duration is told in minutes


def register(app: typer.Typer) -> None:
    """Add the group to `app`."""
    group = typer.Typer(
        name="bench",
        help="Measure this machine, and methods.",
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    group.callback()(_bench)
    group.command("speed")(grouped(speed))
    group.command("passkey")(grouped(passkey))
    group.command("niah")(grouped(niah))
    group.command("methods")(grouped(methods))
    app.add_typer(group)


def _bench() -> None:
    """Measure this machine, and methods."""


def speed(
    model: ModelOptions,
    method: MethodOptions,
    output_options: OutputOptions,
    weights: WeightsOption = "auto",
    depths: Annotated[
        str, typer.Option("--depths", metavar="N,N,…", help="Tokens of context to measure at.")
    ] = "1024,8192,32768",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="At each depth; medians are shown.")] = 5,
) -> None:
    """Measure reading and writing against stock transformers, and against what this machine can do at best.

    Stock's cache is filled with random keys to each depth; a window (of 2,048 tokens, unless `--set` says
    otherwise) is full at every depth. Beside the two stand the rate of the matrix unit, that of the memory
    bus, and the time the kernels of a step take by themselves. Nothing else should be running. Ctrl-C shows
    what was measured until then.
    """
    from everlong.evaluation.speed_report import SpeedPlan

    plan = SpeedPlan(_numbers(depths), repeats)
    policy = _policy(method)
    console = notes(quiet=output_options.quiet)
    with pull_progress(quiet=output_options.quiet) as progress:
        from everlong.models.loading import load_model

        loaded = load_model(model.model, **model.loading(progress))
    from everlong.evaluation.speed_table import speed_table

    report = _measured(loaded, policy, plan, weights, console)
    if output_options.as_json:
        print_json(report.as_json())
    else:
        output().print(speed_table(report))


def _policy(method: MethodOptions) -> Policy:
    """Make the policy that was asked for, its window of the size that benchmarks have."""
    from everlong.attention import make_policy

    window: dict[str, Any] = {"window": _WINDOW} if has_option(method.name, "window") else {}
    return make_policy(method.name, window | parse_settings(method.settings))


def _numbers(depths: str) -> tuple[int, ...]:
    try:
        return tuple(int(depth) for depth in depths.split(",") if depth.strip())
    except ValueError:
        raise ConfigurationError(
            f"--depths takes whole numbers of tokens, such as 1024,8192; got {depths!r}"
        ) from None


def _measured(loaded: Any, policy: Any, plan: Any, weights: str, console: Console) -> SpeedReport:
    """Measure; where that is interrupted, show what there is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from everlong.evaluation.machine_speed import measure_speed
    from everlong.evaluation.speed_table import speed_table

    report = None
    is_drawn = console.is_terminal and not console.quiet
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with (
            closing(measure_speed(loaded, policy, plan, weights=weights)) as reports,
            Progress(*columns, console=console, transient=True, disable=not is_drawn) as bars,
        ):
            task = bars.add_task("warming up", total=1.0)
            for report in reports:
                if not report.rows:
                    console.print(f"this will take about {_duration(report.expected_seconds)}")
                elif not is_drawn and report.rows[-1].repeats == plan.repeats:
                    console.print(f"measured at {report.rows[-1].depth:,} tokens", style="dim")
                bars.update(task, completed=report.done, description=_next(report))
    except KeyboardInterrupt:
        if report is not None and report.rows:
            console.print(speed_table(report))
        raise
    assert report is not None
    return report


def _next(report: SpeedReport) -> str:
    """Say at which depth comes the next repeat."""
    depths, finished = report.plan.depths, len(report.rows)
    if report.rows and report.rows[-1].repeats < report.plan.repeats:
        finished -= 1
    return f"at {depths[min(finished, len(depths) - 1)]:,} tokens"


def _duration(seconds: float) -> str:
    if seconds < _LEAST:
        return f"{10 * math.ceil(seconds / 10)} seconds"
    return f"{math.ceil(seconds / 60)} minutes"
