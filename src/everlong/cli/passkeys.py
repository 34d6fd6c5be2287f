"""``everlong bench passkey``: which methods find a number in a long text."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.options import MethodOptions, ModelOptions, OutputOptions, parse_settings
from everlong.cli.policy_files import has_option, method_name
from everlong.cli.terminal import notes, output, print_json, pull_progress
from everlong.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console, Group

    from everlong.evaluation.finding import Found, FoundShare, PasskeyPlan
    from everlong.evaluation.long_inputs import Way

_WINDOW = 2048
_METHODS = "last,first-and-last,lm-infinite,inf-llm,re-attention,recall"


def passkey(
    model: ModelOptions,
    method: MethodOptions,
    output_options: OutputOptions,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="A,B,…",
            help="Methods by name; stock: the model as it is; last, first-and-last: the model as it is, the "
            "text cut to the window.",
        ),
    ] = _METHODS,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,N,…", help="Tokens of a text; 4k is 4,096.")
    ] = "4k,8k",
    digits: Annotated[str, typer.Option("--digits", metavar="N,N,…", help="Of a passkey.")] = "7,64",
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="FILE", help="Hide it in this text, instead of sentences that say nothing."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Texts of each kind, the passkey ever deeper.")
    ] = 5,
) -> None:
    """Hide a number in a long text, and ask for it at the end.

    Every method reads the same texts, and the question only after them. The window has 2,048 tokens, unless
    `--set` says otherwise. Found is a number that is told whole; beside it stands which share of its digits
    was told before the first mistake. Ctrl-C shows what was measured until then.
    """
    if method.attention is not None:
        raise ConfigurationError("--attention names one method; here --methods names all")
    from everlong.evaluation.finding import PasskeyPlan
    from everlong.evaluation.long_inputs import CUTS, make_ways

    asked = [name.strip() for name in methods.split(",")]
    names = [name if name in CUTS else method_name(name) for name in asked]
    has_window = any(name in CUTS or has_option(name, "window") for name in names)
    settings: dict[str, Any] = {"window": _WINDOW} if has_window else {}
    settings |= parse_settings(method.settings)
    ways = make_ways(names, settings)
    kinds = token_counts("--lengths", lengths), token_counts("--digits", digits)
    plan = PasskeyPlan(*kinds, samples)
    console = notes(quiet=output_options.quiet)
    with pull_progress(quiet=output_options.quiet) as progress:
        from everlong.models.loading import load_model

        loaded = load_model(model.model, **model.loading(progress))
    if text is not None:
        from everlong.evaluation.texts import first_tokens

        excerpt = first_tokens(loaded.tokenizer, Path(text), max(plan.lengths))
        plan = dataclasses.replace(plan, haystack=tuple(excerpt.ids.tolist()))
    found: list[Found] = []
    try:
        _look(loaded, ways, plan, found, console)
    except KeyboardInterrupt:
        if found:
            console.print(_table(found))
        raise
    if output_options.as_json:
        from everlong.evaluation.resources import describe_machine

        print_json(
            {
                "model": loaded.name,
                "machine": describe_machine(),
                "settings": settings,
                "texts": [one.as_json() for one in found],
            }
        )
    else:
        output().print(_table(found))


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


def _look(loaded: Any, ways: list[Way], plan: PasskeyPlan, found: list[Found], console: Console) -> None:
    """Add what becomes of each text to `found`, and show how far that is."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from everlong.evaluation.finding import look_for_passkeys

    is_drawn = console.is_terminal and not console.quiet
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tokens = sum(plan.lengths) * len(plan.digits) * plan.samples * len(ways)
    with Progress(*columns, console=console, transient=True, disable=not is_drawn) as bars:
        task = bars.add_task("reading", total=tokens)
        for one in look_for_passkeys(loaded, ways, plan):
            found.append(one)
            bars.update(task, advance=one.length, description=f"{one.way}, {one.length:,} tokens")
            if not is_drawn:
                told = "found" if one.is_found else f"told {one.told:.0%} of it"
                console.print(
                    f"{one.way}: {one.digits} digits in {one.length:,} tokens, {one.depth:.0%} deep: {told}",
                    style="dim",
                )


def _table(found: list[Found]) -> Group:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table

    from everlong.evaluation.finding import shares
    from everlong.models.files import human_bytes

    kinds: dict[str, list[FoundShare]] = {}
    for share in shares(found):
        kinds.setdefault(f"{share.digits} digits in {share.length:,} tokens", []).append(share)
    tables = []
    for title, some in kinds.items():
        shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, header_style="bold", padding=0)
        for heading in ("", "found", "95 %", "told", "seen", "lost", "held", "tokens/s", "ms/token"):
            shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for share in some:
            shown.add_row(
                share.way,
                f"{share.found.mean:.0%}",
                f"{share.found.low:.0%}-{share.found.high:.0%}",
                f"{share.told:.0%}",
                f"{share.seen:,}",
                f"{share.forgotten:,}",
                human_bytes(sum(share.bytes.values())),
                f"{share.tokens_per_second:,.0f}",
                f"{share.decode_ms:,.1f}",
            )
        tables.append(shown)
    return Group(*tables)
