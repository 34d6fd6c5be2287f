"""What commands share that let methods find something in long texts: options, progress, tables, a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.measures import FINDING, MeasureOptions, measure_and_show, rounded_up, say_estimate
from everlong.cli.options import MethodOptions, ModelOptions, OutputOptions, TierOptions, parse_settings
from everlong.cli.policy_files import has_option, method_name
from everlong.cli.terminal import notes, output, print_json, pull_progress
from everlong.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from everlong.evaluation.finding import FindingPlan, Found
    from everlong.evaluation.kept import KeptRows
    from everlong.evaluation.long_inputs import Way
    from everlong.evaluation.tasks import Task

WINDOW = 2048
SOME_METHODS = "lm-infinite,inf-llm,re-attention,recall"
ALL_METHODS = "all"


@dataclass(frozen=True)
class FindingOptions:
    """Which methods, which texts, and where the page goes."""

    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="A,B,…",
            help="Methods by name, or Python files that register one; all: all that can run with this model. "
            "Beside them always stock, the model as it is, and last and first-and-last: the model as it is, "
            "the text cut to the window.",
        ),
    ] = None
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,…", help="Tokens of a text; 4k is 4,096.")
    ] = "4k,8k"
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Texts of each kind, ever deeper what is to be found.")
    ] = 5
    page: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.html",
            help="Write a page with tables and pictures there, and what was measured beside it, as JSON: the "
            "same command goes on from that.",
        ),
    ] = None
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines",
            help="Without them, only --methods read: where stock would take hours.",
        ),
    ] = True


def find_and_show(
    model: ModelOptions,
    method: MethodOptions,
    options: FindingOptions,
    below: TierOptions,
    output_options: OutputOptions,
    make_tasks: Callable[[], Sequence[Task]],
    *,
    methods: str,
    more: MeasureOptions | None = None,
) -> None:
    """Let methods find what tasks hide, measure what else is asked for, and show it.

    Parameters
    ----------
    model, method, options, below, output_options
        What the command line says.
    make_tasks : callable
        Makes the tasks.
    methods : str
        Those that are measured where none are named.
    more : MeasureOptions, optional
        What is measured; what is found, by default.
    """
    from everlong.evaluation.texts import check_lengths

    if method.attention is not None:
        raise ConfigurationError("--attention names one method; here --methods names all")
    if options.page is not None and options.page.suffix.lower() not in (".html", ".htm"):
        raise ConfigurationError(f"--output names a page, such as report.html, not {options.page}")
    lengths = check_lengths(token_counts("--lengths", options.lengths))
    more = more or MeasureOptions()
    wanted = more.names
    measures = [more.make(name, lengths) for name in wanted if name != FINDING]
    from everlong.evaluation.finding import FindingPlan
    from everlong.evaluation.finding_report import FindingReport, save_html, tables
    from everlong.evaluation.kept import KeptRows
    from everlong.evaluation.long_inputs import (
        CUTS,
        check_ways,
        keeps_below,
        make_ways,
        usable_methods,
        with_baselines,
    )
    from everlong.evaluation.page_parts import section_tables
    from everlong.evaluation.resources import describe_machine

    plan = FindingPlan(tuple(make_tasks()), lengths, options.samples) if FINDING in wanted else None
    has_ways = plan is not None or any(measure.has_ways for measure in measures)
    asked = [name.strip() for name in (options.methods or methods).split(",")]
    is_all, left_out = asked == [ALL_METHODS], dict[str, str]()
    names = [] if is_all else [name if name in CUTS else method_name(name) for name in asked]
    has_window = any(name in CUTS or has_option(name, "window") for name in names)
    settings: dict[str, Any] = {"window": WINDOW} if is_all or options.baselines or has_window else {}
    settings |= parse_settings(method.settings)

    def made(names: list[str]) -> list[Way]:
        chosen = with_baselines(names) if options.baselines else names
        return make_ways(chosen, settings, tier=below.tier())

    ways = [] if is_all or not has_ways else made(names)
    console = notes(quiet=output_options.quiet)
    with pull_progress(quiet=output_options.quiet) as progress:
        from everlong.models.fingerprint import weights_hash
        from everlong.models.loading import load_model

        loaded = load_model(model.model, **model.loading(progress))
    if is_all and has_ways:
        names, left_out = usable_methods(loaded, settings)
        ways = made(names)
    for name, why in left_out.items():
        console.print(f"left out: {name}: {why}", soft_wrap=True, markup=False)
    if below.is_given and not any(keeps_below(loaded, way) for way in ways):
        raise ConfigurationError(
            "none of these methods keeps what leaves its window: --tier and its like are for methods that "
            "recall it, such as --methods inf-llm"
        )
    if not is_all:
        check_ways(loaded, ways)
    kept = None
    if options.page is not None:
        setting = {"model": loaded.name, "weights": weights_hash(loaded.model)[:16]}
        setting |= {"dtype": str(loaded.model.dtype), "device": str(loaded.model.device)}
        kept = KeptRows(options.page.with_suffix(".json"), setting)
    found: list[Found] = []
    steps = {measure.name: measure.steps(loaded, ways) for measure in measures}
    rows: dict[str, list[dict[str, Any]]] = {measure.name: [] for measure in measures}
    if plan is not None and measures:
        plan.check(loaded.tokenizer, ways)  # as the measures did, before anything is read

    def report() -> FindingReport:
        here = describe_machine()
        machines = [*([] if kept is None else (each for each in kept.machines if each != here)), here]
        given = settings if has_ways else {}
        done = (measure for measure in measures if rows[measure.name])
        sections = tuple(measure.section(rows[measure.name]) for measure in done)
        return FindingReport(loaded.name, tuple(found), tuple(machines), given, left_out, sections)

    def show(target: Console) -> None:
        if found:
            target.print(tables(found))
        for section in report().sections:
            target.print(section_tables(section))

    say_estimate(loaded, steps, kept, console)
    try:
        for name in wanted:
            if name in steps:
                measure_and_show(steps[name], kept, rows[name], console)
            elif plan is not None:
                _find(loaded, ways, plan, kept, found, console)
    except BaseException:  # Ctrl-C, or a method that cannot go on: what there is, is shown
        if found or any(rows.values()):
            show(console)
            if options.page is not None:
                save_html(report(), options.page)
        raise
    if options.page is not None:
        save_html(report(), options.page)
    if output_options.as_json:
        print_json(report().as_json())
    else:
        show(output())
    if options.page is not None:
        told = f"written: {options.page}, {options.page.with_suffix('.json')}"
        console.print(told, soft_wrap=True, markup=False)


def token_counts(option: str, text: str) -> tuple[int, ...]:
    """Return numbers from ``"4k, 8192"``, in which k stands for 1,024.

    Raises
    ------
    ConfigurationError
        One is of another form.
    """
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(k?)\s*", part, re.IGNORECASE)
        if match is None:
            raise ConfigurationError(f"{option} takes whole numbers, such as 4k,8192; got {part.strip()!r}")
        counts.append(int(match[1]) * (1024 if match[2] else 1))
    return tuple(counts)


def _find(
    loaded: Any,
    ways: list[Way],
    plan: FindingPlan,
    kept: KeptRows | None,
    found: list[Found],
    console: Console,
) -> None:
    """Add what becomes of each text to `found`, and show how far that is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from everlong.evaluation.finding import find, row_key

    is_drawn = console.is_terminal and not console.quiet
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tokens = sum(plan.lengths) * len(plan.tasks) * plan.samples * len(ways)
    left = {
        (way.name, task.label, length, number): length
        for way in ways
        for task in plan.tasks
        for length in plan.lengths
        for number in range(plan.samples)
        if kept is None or row_key(way, plan, task, length, number) not in kept
    }
    is_told = False
    with Progress(*columns, console=console, transient=True, disable=not is_drawn) as bars:
        task = bars.add_task("reading", total=tokens)
        for one in find(loaded, ways, plan, kept):
            found.append(one)
            if not is_told and (one.way, one.task, one.length, one.sample) in left:
                is_told = True
                seconds = sum(left.values()) * one.answer.seconds / one.answer.read
                console.print(f"at the rate of the first text this takes about {rounded_up(seconds)}")
            bars.update(task, advance=one.length, description=f"{one.way}, {one.task}, {one.length:,} tokens")
            if not is_drawn:
                told = "found" if one.is_found else f"told {one.told:.0%} of it"
                at = "" if one.depth is None else f", {one.depth:.0%} deep"
                line = f"{one.way}: {one.task} in {one.length:,} tokens{at}: {told}"
                console.print(line, style="dim", markup=False)
