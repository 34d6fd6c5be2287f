"""``everlong generate``: go on writing from a prompt of any length."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Annotated

import typer

from everlong.cli.grouping import grouped
from everlong.cli.options import (
    MemoryOption,
    MethodOptions,
    ModelOptions,
    OutputOptions,
    System,
    TierOptions,
    WeightsOption,
    WritingOptions,
)
from everlong.cli.session_options import account, open_llm, open_session, print_as_written, say_memory
from everlong.cli.terminal import notes, print_json
from everlong.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("generate")(grouped(generate))


def generate(
    model: ModelOptions,
    method: MethodOptions,
    below: TierOptions,
    writing: WritingOptions,
    output_options: OutputOptions,
    prompt: Annotated[
        str, typer.Argument(metavar="[TEXT]", help="The text to go on from; - for standard input.")
    ] = "-",
    system: System = None,
    memory: MemoryOption = None,
    weights: WeightsOption = "auto",
) -> None:
    """Go on writing from a text of any length, printing it as it comes."""
    if not prompt:
        raise InputError("the prompt is empty: give a text to go on from, or - for standard input")
    if prompt != "-" and os.path.isfile(prompt):
        raise InputError(
            f"{prompt} is a file: to go on from what it holds, everlong generate < {shlex.quote(prompt)}"
        )
    arguments = writing.arguments()
    with open_llm(model, method, weights=weights, quiet=output_options.quiet, below=below) as llm:
        session = open_session(llm, method, system=system, seed=writing.seed, memories=memory, below=below)
        session.read(sys.stdin.buffer if prompt == "-" else prompt)
        result = print_as_written(session.stream(**arguments), silent=output_options.as_json)
        say_memory(notes(quiet=output_options.quiet), session, result)
    if output_options.as_json:
        print_json(
            {
                "text": result.text,
                "tokens": result.tokens,
                "seconds": result.seconds,
                "stop_reason": result.stop_reason,
                "memories": result.memories,
                "stats": account(result.stats),
            }
        )
