"""``everlong generate`` and ``everlong chat``: go on writing from a prompt, or talk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

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
from everlong.cli.session_options import open_llm, open_session
from everlong.cli.terminal import print_json

Limit = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Nucleus sampling.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the random draws.")]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("generate")(generate)
    app.command("chat")(chat)


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - for standard input.")] = "-",
    max_new_tokens: Limit = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text at which to stop.")] = None,
    model: Model = MODEL_DEFAULT,
    revision: Revision = None,
    attention: Attention = ATTENTION_DEFAULT,
    settings: Settings = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on writing from a prompt."""
    from everlong.reading.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    with open_llm(model, attention, settings, device, dtype, revision, threads, quiet) as llm:
        session = llm.session()
        session.read(sys.stdin.buffer if prompt == "-" else prompt)
        result = session.generate(max_new_tokens, sampling=sampling, stop=stop or ())
    if as_json:
        print_json(
            {
                "text": result.text,
                "tokens": result.tokens,
                "seconds": result.seconds,
                "stop_reason": result.stop_reason,
            }
        )
    else:
        print(result.text)


def chat(
    state: Annotated[
        Path | None, typer.Option("--state", help="Go on from this file, and save to it.")
    ] = None,
    max_new_tokens: Limit = 512,
    model: Model = MODEL_DEFAULT,
    revision: Revision = None,
    attention: Attention = ATTENTION_DEFAULT,
    settings: Settings = None,
    system: System = None,
    device: Device = None,
    dtype: Dtype = None,
    threads: Threads = None,
    quiet: Quiet = False,
) -> None:
    """Talk with a model, one message a line, without end; an empty line or Ctrl-D ends it."""
    with open_llm(model, attention, settings, device, dtype, revision, threads, quiet) as llm:
        session = open_session(llm, system, state)
        while True:
            if sys.stdin.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            message = sys.stdin.readline().strip()
            if not message:
                break
            print(session.chat(message, max_new_tokens=max_new_tokens), flush=True)
            if state is not None:
                session.save(state)
