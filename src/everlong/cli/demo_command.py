"""``everlong demo``: the main job on real text, in under four minutes on two cores."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from everlong.cli.grouping import grouped
from everlong.cli.options import MethodOptions, ModelOptions, OutputOptions, System, parse_settings
from everlong.cli.policy_files import has_option
from everlong.cli.terminal import notes, output, print_json, pull_progress

if TYPE_CHECKING:
    from everlong.evaluation.comparison import Comparison, MethodResult

_TOKENS = 14_336  # 7/4 of what the default model was trained on: its own attention has failed by then
_WINDOW = 2048
_WIDTH = 2048
_STOCK_STEPS, _STEPS = 24, 160


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("demo")(grouped(demo))


def demo(
    model: ModelOptions,
    method: MethodOptions,
    output_options: OutputOptions,
    system: System = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to read.")] = _TOKENS,
    bucket: Annotated[int, typer.Option("--bucket", min=1, help="Positions per row of the table.")] = _WIDTH,
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where demo.png and demo.json go.")
    ] = Path("demo-output"),
) -> None:
    """See the stock model fall apart past its training length, and Everlong read on.

    The model reads about 14,000 tokens of Python's own sources twice: with its stock attention, and with
    Everlong in a window of 2,048 tokens. Then it goes on writing from there. The text of
    `--system` comes first, raw as the sources are, without the model's chat template.
    """
    started = time.perf_counter()
    console = notes(quiet=output_options.quiet)
    console.rule("[bold]everlong demo")
    with pull_progress(quiet=output_options.quiet) as progress:
        from everlong.attention import make_policy
        from everlong.evaluation import report
        from everlong.evaluation.comparison import STOCK, Method, Plan, compare_methods
        from everlong.evaluation.texts import standard_library
        from everlong.kernels.loading import compiled
        from everlong.models.loading import load_model
        from everlong.reading.sampling import Sampling

        options: dict[str, Any] = {"window": _WINDOW} if has_option(method.name, "window") else {}
        policy = make_policy(method.name, options | parse_settings(method.settings))
        loaded = load_model(model.model, **model.loading(progress))
    compiled()  # once for a machine: not while reading is timed
    excerpt = standard_library(loaded.tokenizer, tokens, system=system)
    what = f"{len(excerpt.ids):,} tokens of {excerpt.name}"
    how = f"a window of {policy.span:,} tokens" if policy.span else "no window"
    console.print(
        f"[bold]{escape(loaded.name)}[/] reads {escape(what)}: first as it is, keeping everything, "
        f"then with Everlong's [bold]{method.name}[/] and {how}."
    )
    from everlong.cli.reading_bars import ReadingBars

    with ReadingBars(console, show_text=True) as bars:
        comparison = compare_methods(
            loaded,
            [Method(STOCK, None, _STOCK_STEPS), Method(method.name, policy, _STEPS)],
            excerpt.ids,
            text=excerpt.name,
            plan=Plan(width=bucket, sampling=Sampling(repetition_penalty=1.1)),
            pinned=excerpt.pinned,
            progress=bars.reading,
            on_text=bars.writing,
        )
    report.save_png(comparison, folder / "demo.png")
    report.save_json(comparison, folder / "demo.json")
    if output_options.as_json:
        print_json(comparison.as_json())
    else:
        output().print(report.table(comparison))
        output().print()
        output().print(_verdict(comparison), soft_wrap=False)
    seconds = time.perf_counter() - started
    console.print(
        f"\nThe picture: [bold]{escape(str(folder / 'demo.png'))}[/]; "
        f"the numbers: {escape(str(folder / 'demo.json'))}. "
        f"All of this took {int(seconds) // 60} min {int(seconds) % 60} s.",
        soft_wrap=True,
    )


def _verdict(comparison: Comparison) -> str:
    """Say in two sentences what was measured, whatever it is."""
    from everlong.models.files import human_bytes

    stock, ours = comparison.results
    inside = _last_inside(stock, comparison.trained_until)
    before = "" if inside is None else f", after {inside} just inside the training length,"
    return (
        f"Over the last {_width(stock):,} tokens the stock model's perplexity is {_last(stock)}{before} "
        f"and {ours.name}'s is {_last(ours)}. "
        f"At the end stock holds {human_bytes(sum(stock.bytes.values()))} and reads "
        f"{stock.last_tokens_per_second:,.0f} tokens/s, {ours.name} holds "
        f"{human_bytes(sum(ours.bytes.values()))} and reads {ours.last_tokens_per_second:,.0f}; "
        f"it has forgotten {ours.forgotten:,} of {ours.seen:,} tokens."
    )


def _last(result: MethodResult) -> str:
    return f"{result.buckets[-1].perplexity:,.1f}"


def _width(result: MethodResult) -> int:
    return result.buckets[-1].stop - result.buckets[-1].start


def _last_inside(result: MethodResult, length: int | None) -> str | None:
    inside = [bucket for bucket in result.buckets if length is not None and bucket.stop <= length]
    return f"{inside[-1].perplexity:,.1f}" if inside and inside[-1] is not result.buckets[-1] else None
