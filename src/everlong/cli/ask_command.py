"""``everlong ask``: answer questions from memory, with nothing read."""

from __future__ import annotations

from typing import Annotated

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
)
from everlong.cli.session_options import account, open_llm, open_session, print_as_written, say_memory
from everlong.cli.terminal import notes, print_json


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("ask")(grouped(ask))


def ask(
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION", help="One or more questions.")],
    model: ModelOptions,
    method: MethodOptions,
    writing: WritingOptions,
    output_options: OutputOptions,
    memory: MemoryOption = None,
    system: System = None,
    weights: WeightsOption = "auto",
) -> None:
    """Answer questions, each by itself, from what the model knows and from memories.

    To ask about files that are read first, use `everlong read FILE --ask QUESTION`.
    """
    arguments = writing.arguments()
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
            shown.append(
                {
                    "question": question,
                    "answer": answer.text,
                    "tokens": answer.tokens,
                    "memories": answer.memories,
                }
            )
        if output_options.as_json:
            print_json({"answers": shown, "stats": account(session.stats)})
