"""``everlong bench methods``: all methods side by side, in all kinds of long texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from everlong.cli.finding import ALL_METHODS, FindingOptions, find_and_show
from everlong.cli.measures import MeasureOptions, refuse_unused
from everlong.cli.options import MethodOptions, ModelOptions, OutputOptions, TierOptions

if TYPE_CHECKING:
    from everlong.evaluation.tasks import Task

_TASKS = "passkey,passkey:digits=64,niah,niah_single_1,niah_multikey_2,niah_multikey_3,vt,cwe,fwe"


def methods(
    context: typer.Context,
    model: ModelOptions,
    method: MethodOptions,
    finding: FindingOptions,
    measured: MeasureOptions,
    tier: TierOptions,
    output_options: OutputOptions,
    tasks: Annotated[
        str,
        typer.Option(
            "--tasks",
            metavar="A,B,…",
            help="Kinds of texts: passkey, niah, and of RULER niah_single_1, niah_multikey_2, "
            "niah_multikey_3, vt, cwe, fwe. Options stand behind colons: passkey:digits=64, "
            "niah:text=FILE, cwe:repeats=20.",
        ),
    ] = _TASKS,
) -> None:
    """Measure methods side by side: who finds what in long texts, and what that takes.

    With `--measures` also how well each predicts a text, by position, how fast each reads and writes, by
    length, and what long-term memories recall: all on one page.

    All registered methods that can run with this model, unless `--methods` names some; `full` is left out,
    which sees what stock sees. Every method reads the same texts, and the question only after them. The
    window has 2,048 tokens, unless `--set` says otherwise. Ctrl-C shows what was measured until then; with
    `--output` the same command goes on from there.
    """
    refuse_unused(context, measured.names)

    def make_tasks() -> list[Task]:
        from everlong.evaluation import make_task

        return [make_task(task) for task in tasks.split(",")]

    find_and_show(
        model, method, finding, tier, output_options, make_tasks, methods=ALL_METHODS, more=measured
    )
