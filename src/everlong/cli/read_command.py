"""``everlong read``: read files as one stream, and answer questions about them."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from everlong.cli.options import (
    ATTENTION_DEFAULT,
    MODEL_DEFAULT,
    Attention,
    Device,
    Dtype,
    Json,
    Model,
    Quiet,
    Revision,
    Settings,
    System,
    Threads,
)
from everlong.cli.session_options import account, open_llm, open_session
from everlong.cli.terminal import notes, output, print_json


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("read")(read)


def read(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Text files; - for standard input.")],
    ask: Annotated[
        list[str] | None, typer.Option("--ask", metavar="Q", help="A question, after reading.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Go on from this file, and save to it.")
    ] = None,
    surprisal: Annotated[bool, typer.Option("--surprisal", help="Report perplexity too.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Of each answer.")] = 256,
    model: Model = MODEL_DEFAULT,
    revision: Revision = None,
    attention: Attention = ATTENTION_DEFAULT,
    settings: Settings = None,
    system: System = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read files as one stream of any length, in bounded memory."""
    from everlong.cli.reading_bars import ReadingBars

    console = notes(quiet=quiet)
    answers: list[dict[str, Any]] = []
    with open_llm(model, attention, settings, device, dtype, revision, threads, quiet) as llm:
        session = open_session(llm, system, state, surprisal=surprisal)
        try:
            for file in files:
                with ReadingBars(console) as bars:
                    source = sys.stdin.buffer if file == "-" else Path(file)
                    session.read(source, progress=partial(bars.reading, file))
        finally:
            if state is not None:
                session.save(state)
                console.print(f"saved to {state}", soft_wrap=True)
        for question in ask or []:
            answer = session.ask(question, max_new_tokens=max_new_tokens)
            answers.append({"question": question, "answer": str(answer)})
            if not as_json:
                output().print(str(answer), markup=False, soft_wrap=True)
        if as_json:
            print_json({"answers": answers, "stats": account(session)})
        else:
            stats = session.stats
            console.print(
                f"{stats.tokens_read:,} tokens read, {stats.kept:,} kept, {stats.forgotten:,} forgotten, "
                f"{sum(stats.bytes.values()):,} bytes, {stats.seconds:.1f} s",
                soft_wrap=True,
            )
