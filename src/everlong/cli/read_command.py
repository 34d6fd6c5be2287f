"""``everlong read``: read files as one stream, and answer questions about them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

from everlong.cli.grouping import grouped
from everlong.cli.options import (
    RECIPE_DEFAULT,
    MemoryOption,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    System,
    TierOptions,
    WeightsOption,
    WritingOptions,
    parse_settings,
)
from everlong.cli.session_options import (
    account,
    answered,
    check_sources,
    check_state,
    first_of,
    in_words,
    open_llm,
    open_session,
    print_as_written,
    say_memory,
    source_of,
)
from everlong.cli.terminal import duration, notes, output, print_json
from everlong.errors import ConfigurationError
from everlong.models.files import human_bytes

if TYPE_CHECKING:
    from everlong.llm import LLM
    from everlong.memory.passing import Learning
    from everlong.reading.reports import Generation
    from everlong.reading.session import Session

_LEARNING = "Learning"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("read")(grouped(read))


def read(
    files: Annotated[list[str], typer.Argument(metavar="FILE", help="Text files; - for standard input.")],
    model: ModelOptions,
    method: MethodOptions,
    below: TierOptions,
    writing: WritingOptions,
    output_options: OutputOptions,
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="Q", help="Answer this after reading. May be given several times."),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option("--state", metavar="FILE", help="Go on from this file if it is there, and save to it."),
    ] = None,
    system: System = None,
    memory: MemoryOption = None,
    memorize: Annotated[
        str | None,
        typer.Option(
            "--memorize",
            metavar="NAME",
            help="Learn what leaves the window into this memory, which the model then knows by heart.",
            rich_help_panel=_LEARNING,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", help=f"How that is learned (default: {RECIPE_DEFAULT}).", rich_help_panel=_LEARNING
        ),
    ] = None,
    recipe_settings: Annotated[
        list[str] | None,
        typer.Option(
            "--recipe-set",
            metavar="KEY=VALUE",
            help="A setting of the recipe, such as generators=cloze. May be given several times.",
            rich_help_panel=_LEARNING,
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace a memory of that name.", rich_help_panel=_LEARNING),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Go on where the text is worth nothing to the model.", rich_help_panel=_LEARNING
        ),
    ] = False,
    weights: WeightsOption = "auto",
    surprisal: Annotated[
        bool, typer.Option("--surprisal", help="Report perplexity too; it takes the model's head.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cost, in tokens, minutes and bytes.")
    ] = False,
) -> None:
    """Read files as one stream of any length, in bounded memory, and answer questions about it.

    Each question is answered from the end of the stream by itself; several are written at the same time, and
    the first is shown as it is written. Ctrl-C ends the reading; with `--state` what was read is saved, also
    what is waiting for the model, and the same command with the rest of the text goes on. With `--memorize`
    what leaves the window is learned; what is in it at the end is learned too, unless `--state` is there to
    go on.
    """
    from everlong.memory.passing import Learning

    console = notes(quiet=output_options.quiet)
    arguments = writing.arguments()
    _check(files, state)
    learning = None
    changes = cast(dict[str, Any], parse_settings(recipe_settings, "--recipe-set"))
    if memorize is not None:
        learning = Learning(
            memorize, recipe or RECIPE_DEFAULT, replace=replace, force=force, settings=changes
        )
    elif recipe or changes or replace or force:
        raise ConfigurationError(
            "--recipe, --recipe-set, --replace and --force say how to learn: give --memorize NAME too"
        )
    with open_llm(model, method, weights=weights, quiet=output_options.quiet, below=below) as llm:
        if dry_run:
            below.check(llm, llm.attention)
            _estimate(llm, files, surprisal=surprisal, as_json=output_options.as_json)
            return
        session = open_session(
            llm,
            method,
            system=system,
            state=state,
            surprisal=surprisal,
            seed=writing.seed,
            memories=memory,
            below=below,
        )
        _read(session, files, state, console, learning)
        answers = _answers(llm, session, ask or [], arguments, console, silent=output_options.as_json)
        if output_options.as_json:
            shown = [answered(question, answer) for question, answer in zip(ask or [], answers, strict=True)]
            print_json({"answers": shown, "stats": account(session.stats)})


def _check(files: Sequence[str], state: Path | None) -> None:
    """Refuse what cannot be read before a model is loaded."""
    check_sources(files)
    check_state(state)


def _read(
    session: Session, files: Sequence[str], state: Path | None, console: Console, learning: Learning | None
) -> None:
    """Read the files one after another; whatever ends it, what was read is saved."""
    from everlong.cli.reading_bars import ReadingBars

    before = session.stats.tokens_read
    try:
        for file in files:
            with ReadingBars(console) as bars:
                session.read(
                    source_of(file),
                    progress=partial(bars.reading, file),
                    memorize=learning or False,
                    learn_progress=partial(bars.learning, file),
                )
        if learning is not None and state is None:
            with ReadingBars(console) as bars:
                learned = session.memorize(progress=partial(bars.learning, files[-1]))
            console.print(
                f"memory {learned.name}: {learned.tokens:,} tokens learned in {learned.segments} "
                f"segment{'s'[: learned.segments != 1]}",
                soft_wrap=True,
                markup=False,
            )
    finally:
        if state is not None and session.stats.tokens_read > before:
            session.save(state)
            console.print(f"saved to {state}", soft_wrap=True, markup=False)
        if session.stats.tokens_read:
            console.print(in_words(session.stats), soft_wrap=True)


def _answers(
    llm: LLM,
    session: Session,
    questions: Sequence[str],
    arguments: dict[str, Any],
    console: Console,
    *,
    silent: bool,
) -> list[Generation]:
    """Print each question and its answer: the first as it is written, those written beside it afterwards."""

    def ask_aloud(question: str) -> None:
        console.print(f"\n{question}", style="bold", markup=False, soft_wrap=True)

    speculate, together = arguments["speculate"], {k: v for k, v in arguments.items() if k != "speculate"}
    if len(questions) < 2 or speculate is not None:
        answers = []
        for question in questions:
            ask_aloud(question)
            answers.append(print_as_written(session.stream_answer(question, **arguments), silent=silent))
            say_memory(console, session, answers[-1])
        return answers
    writing = llm.stream_together([session] * len(questions), questions=questions, **together)
    ask_aloud(questions[0])
    answers = print_as_written(first_of(writing), silent=silent)
    say_memory(console, session, answers[0])
    for question, answer in zip(questions[1:], answers[1:], strict=True):
        ask_aloud(question)
        if not silent:
            sys.stdout.write(f"{answer.text}\n")
        say_memory(console, session, answer)
    return answers


def _estimate(llm: LLM, files: Sequence[str], *, surprisal: bool, as_json: bool) -> None:
    from everlong.evaluation.estimate import count_tokens, estimate

    counts = [(file, count_tokens(llm.tokenizer, source_of(file))) for file in files]
    cost = estimate(llm.handle, sum(count for _, count in counts), surprisal=surprisal)
    if as_json:
        listed = [{"name": file, "tokens": count} for file, count in counts]
        print_json({"files": listed, **dataclasses.asdict(cost)})
        return
    for file, count in counts:
        output().print(f"{file}: {count:,} tokens", markup=False, soft_wrap=True)
    output().print(
        f"{cost.tokens:,} tokens, about {duration(cost.seconds)} "
        f"({cost.last_tokens_per_second:,.0f} tokens/s at the end), "
        f"{human_bytes(sum(cost.bytes.values()))} held at the end, under {llm.attention}",
        markup=False,
        soft_wrap=True,
    )
