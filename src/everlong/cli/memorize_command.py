"""``everlong memorize``: turn files into a memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from everlong.cli.grouping import grouped
from everlong.cli.learning_bars import learning_bars, uncovered_in_words
from everlong.cli.options import RECIPE_DEFAULT, ModelOptions, OutputOptions, parse_settings
from everlong.cli.session_options import check_sources, source_of
from everlong.cli.terminal import notes, output, print_json, pull_progress
from everlong.models.files import human_bytes

if TYPE_CHECKING:
    from everlong.memory.folder import Memory

_RECIPE = "Recipe"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("memorize")(grouped(memorize))


def memorize(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Text files; - for standard input.")],
    name: Annotated[str, typer.Option("--name", "-n", metavar="NAME", help="What the memory is called.")],
    model: ModelOptions,
    output_options: OutputOptions,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="infinite-icl, context-distillation, lift, temp-lora, cartridge.",
            rich_help_panel=_RECIPE,
        ),
    ] = RECIPE_DEFAULT,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "--recipe-set",
            metavar="KEY=VALUE",
            help="A setting of the recipe, such as passes=4 or generators=cloze; everlong methods RECIPE "
            "lists them. May be given several times.",
            rich_help_panel=_RECIPE,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what is drawn.", rich_help_panel=_RECIPE)] = 0,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a memory of that name.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Go on where the text is worth nothing to the model.")
    ] = False,
) -> None:
    """Turn files into a memory: a small adapter with which the model answers without the text.

    Segment by segment, the model is asked about the text, answers reading it, and learns to answer without.
    Ctrl-C ends it; the same command goes on from the last whole segment. Where reading the text does not help
    the model, it stops and says so. Use the memory with `everlong chat --memory NAME`.
    """
    import everlong
    from everlong.memory.recipes import make_recipe

    changes = parse_settings(settings, "--recipe-set")
    make_recipe(recipe, **changes)  # checks them, before a model is loaded
    check_sources(files)
    console = notes(quiet=output_options.quiet)
    with pull_progress(quiet=output_options.quiet) as pulling:
        llm = everlong.load(model.model, **model.loading(pulling))
    with llm, learning_bars(console) as report:
        memory = llm.memorize(
            _joined(files),
            name,
            recipe,
            seed=seed,
            replace=replace,
            force=force,
            progress=report,
            **cast(dict[str, Any], changes),
        )
    if output_options.as_json:
        import dataclasses

        print_json(
            {**dataclasses.asdict(memory.record), "path": str(memory.path), "pairs": len(memory.pairs())}
        )
    else:
        output().print(_in_words(memory), markup=False, soft_wrap=True)


def _joined(files: Sequence[str]) -> Iterator[str]:
    """Yield the texts of all files, a blank line between them."""
    from everlong.reading.source import open_source

    for number, file in enumerate(files):
        if number:
            yield "\n\n"
        for piece in open_source(source_of(file), 0):
            assert isinstance(piece, str)
            yield piece


def _in_words(memory: Memory) -> str:
    record = memory.record
    measured = record.measured or {}
    lacking = measured.get("uncovered", 0)
    covered = f"{uncovered_in_words(lacking, measured['sentences'])}; " if lacking else ""
    return (
        f"{memory.name}: {record.source.tokens:,} tokens of {record.base_model} learned in "
        f"{record.segments} segment{'s' if record.segments != 1 else ''}, {len(memory.pairs()):,} pairs, "
        f"{covered}{record.seconds:,.0f} s; {human_bytes(memory.bytes)} in {memory.path}\n"
        f"everlong chat --model {record.base_model} --memory {memory.name}"
    )
