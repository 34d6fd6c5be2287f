"""``everlong compare``: methods side by side on a text of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.grouping import grouped
from everlong.cli.options import MethodOptions, ModelOptions, OutputOptions, System, parse_settings
from everlong.cli.policy_files import method_name
from everlong.cli.terminal import notes, output, print_json, pull_progress
from everlong.errors import ConfigurationError, InputError

if TYPE_CHECKING:
    from everlong.evaluation.comparison import Comparison, MethodResult
    from everlong.evaluation.texts import Excerpt

_TOKENS = 16_384

File = Annotated[str, typer.Argument(metavar="FILE", help="A text file; - for standard input.")]
Methods = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="A,B,…",
        help="What to compare: stock (the model as it is), lm-infinite, streaming-llm, recall, inf-llm, "
        "quest, infinite-hip, re-attention, snap-kv, pyramid-kv, h2o, sir-llm, infini-pot, self-extend, "
        "dual-chunk, linear, ntk, yarn, full, Python files that register one. Default: stock and the method "
        "of --attention.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("compare")(grouped(compare))


def compare(
    file: File,
    model: ModelOptions,
    method: MethodOptions,
    output_options: OutputOptions,
    methods: Methods = None,
    system: System = None,
    tokens: Annotated[
        int, typer.Option("--tokens", min=0, help="Tokens to read from the beginning; 0: the whole text.")
    ] = _TOKENS,
    bucket: Annotated[int, typer.Option("--bucket", min=1, help="Positions per row of the table.")] = 2048,
    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Tokens read at a time.")] = 512,
    folder: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Write compare.json and compare.png there."),
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="PATH", help="Write the picture to this file.")
    ] = None,
) -> None:
    """Compare methods on a text: perplexity by position, speed, bytes held.

    The model is loaded once and reads the text under each method in turn; **stock** is the model as it is,
    with transformers' own cache. An option given with `--set` goes to every method that has it;
    `--attention M` is short for `--methods stock,M`. Text is read raw, that of `--system` too: without the
    model's chat template. Positions count from where the system text ends.
    """
    if methods is not None and method.attention is not None:
        raise ConfigurationError(
            "--methods names all methods and --attention one beside stock: give one of the two"
        )
    names = (
        ["stock", method.name] if methods is None else [method_name(m.strip()) for m in methods.split(",")]
    )
    console = notes(quiet=output_options.quiet)
    from everlong.evaluation import report
    from everlong.evaluation.comparison import Plan, make_methods

    chosen = make_methods(names, parse_settings(method.settings))
    with pull_progress(quiet=output_options.quiet) as progress:
        from everlong.models.loading import load_model

        loaded = load_model(model.model, **model.loading(progress))
    excerpt = _excerpt(loaded.tokenizer, file, tokens, system)
    if not excerpt.is_whole:
        console.print(
            f"{excerpt.name} goes on after the {len(excerpt.ids):,} tokens that are compared; "
            "--tokens reads more, --tokens 0 all of it",
            soft_wrap=True,
        )
    comparison = _compared(loaded, chosen, excerpt, Plan(chunk, bucket), console)
    pictures = [path for path in (folder / "compare.png" if folder else None, png) if path is not None]
    for path in pictures:
        report.save_png(comparison, path)
    if folder is not None:
        report.save_json(comparison, folder / "compare.json")
    if output_options.as_json:
        print_json(comparison.as_json())
    else:
        output().print(report.table(comparison))
    if folder is not None:
        pictures.append(folder / "compare.json")
    if pictures:
        console.print(f"written: {', '.join(str(path) for path in pictures)}", soft_wrap=True)


def _excerpt(tokenizer: Any, file: str, tokens: int, system: str | None) -> Excerpt:
    from everlong.evaluation.texts import first_tokens

    limit = tokens or None
    if file == "-":
        excerpt = first_tokens(tokenizer, sys.stdin.buffer, limit, name="standard input", system=system)
    else:
        excerpt = first_tokens(tokenizer, Path(file), limit, system=system)
    if len(excerpt.ids) < 2:
        raise InputError(f"{excerpt.name} has {len(excerpt.ids)} token: perplexity needs at least 2")
    return excerpt


def _compared(loaded: Any, methods: Any, excerpt: Excerpt, plan: Any, console: Any) -> Comparison:
    """Compare; where that is interrupted, show the methods that were finished."""
    from everlong.cli.reading_bars import ReadingBars
    from everlong.evaluation import report
    from everlong.evaluation.comparison import compare_methods, gathered

    finished: list[MethodResult] = []
    try:
        with ReadingBars(console) as bars:
            return compare_methods(
                loaded,
                methods,
                excerpt.ids,
                text=excerpt.name,
                plan=plan,
                pinned=excerpt.pinned,
                progress=bars.reading,
                on_text=bars.writing,
                on_result=finished.append,
            )
    except KeyboardInterrupt:
        if finished:
            partial = gathered(
                loaded,
                finished,
                tokens=len(excerpt.ids),
                text=excerpt.name,
                plan=plan,
                pinned=len(excerpt.pinned),
            )
            console.print(report.table(partial))
        raise
