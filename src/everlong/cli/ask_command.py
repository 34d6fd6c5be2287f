"""``everlong ask``: answer questions from memory, with nothing read; or one about files read for it."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.grouping import grouped
from everlong.cli.options import (
    MemoryOption,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    System,
    WeightsOption,
    WritingOptions,
    parse_settings,
)
from everlong.cli.session_options import (
    account,
    answered,
    check_sources,
    in_words,
    open_llm,
    open_session,
    print_as_written,
    say_memory,
    source_of,
)
from everlong.cli.terminal import notes, print_json
from everlong.errors import ConfigurationError

if TYPE_CHECKING:
    from everlong.cli.reading_bars import ReadingBars
    from everlong.reading import Generation, ReadingMethod


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("ask")(grouped(ask))


def ask(
    questions: Annotated[
        list[str],
        typer.Argument(
            metavar="QUESTION...|QUESTION FILE...",
            help="Questions; with --method one, and the files that it is about (- for standard input).",
        ),
    ],
    model: ModelOptions,
    method: MethodOptions,
    writing: WritingOptions,
    output_options: OutputOptions,
    reading: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Read files for the question: homer, infini-retri, parallel-windows; --set: its options.",
        ),
    ] = None,
    memory: MemoryOption = None,
    system: System = None,
    weights: WeightsOption = "auto",
) -> None:
    """Answer questions, each by itself, from what the model knows and from memories.

    With --method, answer one question about files that are read for it, with the question known:
    `everlong ask QUESTION FILE... --method infini-retri`. To read files once, without knowing what will be
    asked, use `everlong read FILE --ask QUESTION`.
    """
    arguments = writing.arguments()
    if reading is not None:
        made = _method(reading, method, memory, questions)
        _ask_about(questions, made, model, writing, output_options, arguments, system, weights)
        return
    _refuse_files(questions)
    console = notes(quiet=output_options.quiet)
    shown = []
    with open_llm(model, method, weights=weights, quiet=output_options.quiet) as llm:
        session = open_session(llm, method, system=system, seed=writing.seed, memories=memory)
        for question in questions:
            console.print(f"\n{question}", style="bold", markup=False, soft_wrap=True)
            answer = print_as_written(
                session.stream_answer(question, **arguments), silent=output_options.as_json
            )
            say_memory(console, session, answer)
            shown.append(answered(question, answer))
        if output_options.as_json:
            print_json({"answers": shown, "stats": account(session.stats)})


def _refuse_files(questions: list[str]) -> None:
    """Raise where a question is the name of a file: its text would not be read."""
    for question in questions:
        if os.path.isfile(question):
            raise ConfigurationError(
                f"{question} is a file, and ask reads none without --method: use everlong read {question} "
                f"--ask QUESTION, which reads it once for any question, or everlong ask QUESTION {question} "
                "--method infini-retri"
            )


def _method(name: str, method: MethodOptions, memory: list[str] | None, words: list[str]) -> ReadingMethod:
    """Make the reading method that was asked for, before a model is loaded."""
    from everlong.reading.outside import make_reading_method

    made = make_reading_method(name, dict(parse_settings(method.settings)))
    refused = {"--attention": method.attention is not None, "--memory": bool(memory)}
    for option in (option for option, is_given in refused.items() if is_given):
        raise ConfigurationError(
            f"{name} reads in its own way, and what it reads: leave out {option}, or leave out --method"
        )
    if len(words) < 2:
        raise ConfigurationError(
            f"{name} knows the question before it reads, so it takes both: "
            f"everlong ask QUESTION FILE... --method {name}"
        )
    check_sources(words[1:])
    return made


def _ask_about(
    words: list[str],
    made: ReadingMethod,
    model: ModelOptions,
    writing: WritingOptions,
    output_options: OutputOptions,
    arguments: dict[str, Any],
    system: str | None,
    weights: str,
) -> None:
    """Read files for a question, and print the answer as it is written."""
    from everlong.cli.reading_bars import ReadingBars

    console = notes(quiet=output_options.quiet)
    question, files = words[0], words[1:]
    arguments["sampling"] = replace(arguments["sampling"], seed=writing.seed)
    with (
        open_llm(model, MethodOptions(), weights=weights, quiet=output_options.quiet) as llm,
        ReadingBars(console) as bars,
    ):
        pieces = llm.stream_answer(
            [source_of(file) for file in files],
            question,
            made,
            system=system,
            progress=partial(bars.reading, files[0] if len(files) == 1 else f"{len(files)} files"),
            **arguments,
        )
        answer = print_as_written(_behind_bars(pieces, bars), silent=output_options.as_json)
    console.print(in_words(answer.stats), soft_wrap=True)
    if output_options.as_json:
        print_json({"answers": [answered(question, answer)], "stats": account(answer.stats)})


def _behind_bars(
    pieces: Generator[str, None, Generation], bars: ReadingBars
) -> Generator[str, None, Generation]:
    """Yield what is written, the bars of the reading being over."""
    try:
        while True:
            piece = next(pieces)
            bars.writing("", piece)
            yield piece
    except StopIteration as end:
        answer: Generation = end.value
        return answer
    finally:
        pieces.close()
