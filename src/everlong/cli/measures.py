"""What ``everlong bench methods`` can measure beside what is found: options, progress, estimates."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.options import parse_settings
from everlong.cli.terminal import duration
from everlong.errors import ConfigurationError
from everlong.registry import unknown_name

if TYPE_CHECKING:
    from rich.console import Console

    from everlong.evaluation.kept import KeptRows
    from everlong.evaluation.measures import Measure, Step
    from everlong.models.loading import LoadedModel

FINDING = "finding"
MEASURES = (FINDING, "perplexity", "speed", "memory")
"""Every name that ``--measures`` takes."""

_WITH_WAYS = (FINDING, "perplexity", "speed")
_NEEDS = {
    "tasks": ("--tasks", (FINDING,)),
    "samples": ("--samples", (FINDING,)),
    "methods": ("--methods", _WITH_WAYS),
    "baselines": ("--baselines", _WITH_WAYS),
    "settings": ("--set", _WITH_WAYS),
    "lengths": ("--lengths", _WITH_WAYS),
    "place": ("--tier", _WITH_WAYS),
    "tier_precision": ("--tier-precision", _WITH_WAYS),
    "tier_limit": ("--tier-limit", _WITH_WAYS),
    "text": ("--text", ("perplexity", "speed", "memory")),
    "bucket": ("--bucket", ("perplexity",)),
    "memory": ("--memory", ("memory",)),
    "documents": ("--documents", ("memory",)),
    "recipe_settings": ("--recipe-set", ("memory",)),
}
"""Options by the name of their parameter, and the measures that go by each."""

_PANEL = "Measures"
_SECONDS = 5.0  # between two lines about a step, where no bar is drawn


@dataclass(frozen=True)
class MeasureOptions:
    """What is measured, and of what."""

    measures: Annotated[
        str,
        typer.Option(
            "--measures",
            metavar="A,B,…",
            help="finding: what is found in the texts of --tasks. perplexity: by position in a text. speed: "
            "of reading and writing, at each of --lengths. memory: what long-term memories recall, and what "
            "they cost elsewhere.",
            rich_help_panel=_PANEL,
        ),
    ] = FINDING
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="What perplexity and speed are measured on, and forgetting (default: library, Python's own "
            "sources).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    bucket: Annotated[
        int | None,
        typer.Option(
            "--bucket",
            min=1,
            help="Positions that share one perplexity (default: an eighth of the longest of --lengths).",
            rich_help_panel=_PANEL,
        ),
    ] = None
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            metavar="NAME",
            help="A memory to ask with what it was learned from. May be given several times. Without it, "
            "invented facts are learned and asked for: minutes a document.",
            rich_help_panel=_PANEL,
        ),
    ] = None
    documents: Annotated[
        int | None,
        typer.Option(
            "--documents", min=1, help="Of invented facts, to learn (default: 1).", rich_help_panel=_PANEL
        ),
    ] = None
    recipe_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe-set",
            metavar="KEY=VALUE",
            help="A setting of the recipe by which they are learned. May be given several times.",
            rich_help_panel=_PANEL,
        ),
    ] = None

    @property
    def names(self) -> list[str]:
        """The measures asked for, in that order.

        Raises
        ------
        ConfigurationError
            One is unknown or named twice, or there is none; or facts are to be invented for a memory that is
            there.
        """
        names = [name.strip() for name in self.measures.split(",") if name.strip()]
        for name in names:
            if name not in MEASURES:
                raise unknown_name("measure", name, list(MEASURES))
        if not names or len(set(names)) != len(names):
            raise ConfigurationError(f"--measures names each once, and at least one: {', '.join(MEASURES)}")
        if self.memory and (self.documents or self.recipe_settings):
            raise ConfigurationError(
                "--memory asks a memory that is there; --documents and --recipe-set are for invented facts, "
                "which are learned where no --memory is named"
            )
        return names

    def make(self, name: str, lengths: Sequence[int]) -> Measure:
        """Make one of the measures, other than finding."""
        from everlong.evaluation.texts import LIBRARY

        text = LIBRARY if self.text is None else self.text
        if name == "perplexity":
            from everlong.evaluation.perplexity_measure import PerplexityByPosition

            return PerplexityByPosition(max(lengths), text=text, width=self.bucket)
        if name == "speed":
            from everlong.evaluation.speed_measure import SpeedByLength

            return SpeedByLength(tuple(lengths), text=text)
        if self.memory:
            from everlong.evaluation.stored_memories import StoredMemories

            return StoredMemories(memories=tuple(self.memory), text=text)
        from everlong.evaluation.invented_facts import InventedFacts

        settings: dict[str, Any] = parse_settings(self.recipe_settings, "--recipe-set")
        return InventedFacts(documents=self.documents or 1, settings=settings, text=text)


def refuse_unused(context: typer.Context, names: Sequence[str]) -> None:
    """Refuse options on the command line that none of these measures goes by.

    Parameters
    ----------
    context : typer.Context
        Of the command.
    names : sequence of str
        Of measures.

    Raises
    ------
    ConfigurationError
        There is one.
    """
    for parameter, (option, wanted) in _NEEDS.items():
        source = context.get_parameter_source(parameter)
        if source is not None and source.name == "COMMANDLINE" and not set(wanted) & set(names):
            measures = " or ".join(wanted)
            raise ConfigurationError(f"{option} is for the measure {measures}: name it with --measures")


def say_estimate(
    loaded: LoadedModel, steps: dict[str, list[Step]], kept: KeptRows | None, console: Console
) -> None:
    """Say how long what is left of each measure takes, before it begins."""
    from everlong.evaluation.estimate import reading_rate
    from everlong.evaluation.measures import left

    undone = {name: left(some, kept) for name, some in steps.items()}
    if console.quiet or not any(undone.values()):
        return
    rate = reading_rate(loaded)
    for name, some in undone.items():
        if some:
            told = duration(10 * math.ceil(sum(step.tokens for step in some) / rate / 10))
            console.print(
                f"{name}: {len(some)} step{'s'[: len(some) != 1]}, about {told}", soft_wrap=True, markup=False
            )


def measure_and_show(
    steps: Sequence[Step],
    kept: KeptRows | None,
    rows: list[dict[str, Any]],
    console: Console,
) -> None:
    """Add what each step gives to `rows`, and show how far that is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from everlong.evaluation.measures import taken

    is_drawn = console.is_terminal and not console.quiet
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    said = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not is_drawn) as bars:
        task = bars.add_task(steps[0].label, total=sum(step.tokens for step in steps), note="")

        def on_step(done: float, note: str) -> None:
            nonlocal said
            step = steps[len(rows)]
            before = sum(each.tokens for each in steps[: len(rows)])
            bars.update(task, completed=before + done * step.tokens, note=note)
            if not is_drawn and done < 1 and time.monotonic() - said > _SECONDS:
                said = time.monotonic()
                console.print(f"{step.label}: {done:.0%}, {note}", style="dim", markup=False, soft_wrap=True)

        for row in taken(steps, kept, on_step):
            rows.append(row)
            done = sum(step.tokens for step in steps[: len(rows)])
            following = steps[min(len(rows), len(steps) - 1)].label
            bars.update(task, completed=done, description=following, note="")
            if not is_drawn:
                console.print(f"{steps[len(rows) - 1].label}: done", style="dim", markup=False)
