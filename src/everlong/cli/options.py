"""Options that several commands share, with one wording each, and what is made of them."""

from __future__ import annotations

from typing import Annotated

import typer

from everlong.errors import ConfigurationError
from everlong.models.catalogue import DEFAULT_MODEL

_MODEL, _METHOD, _MACHINE, _OUTPUT = "Model", "Attention", "Machine", "Output"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH|HUB-ID",
        help="A name from `everlong models`, a folder, a .gguf file or a hub id.",
        rich_help_panel=_MODEL,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a hub id.", rich_help_panel=_MODEL),
]
System = Annotated[
    str | None,
    typer.Option(
        "--system", metavar="TEXT", help="Instructions that are never forgotten.", rich_help_panel=_MODEL
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        "--attention",
        "-a",
        metavar="METHOD",
        help="Attention method: lm-infinite, streaming-llm, full.",
        rich_help_panel=_METHOD,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="An option of the attention method, such as window=2048. May be given several times.",
        rich_help_panel=_METHOD,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, mps … (default: cuda if there is one)", rich_help_panel=_MACHINE
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16 (default: float32 on the CPU)",
        rich_help_panel=_MACHINE,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads (default: PyTorch's)", rich_help_panel=_MACHINE),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead of text.", rich_help_panel=_OUTPUT),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress and no remarks.", rich_help_panel=_OUTPUT),
]

MODEL_DEFAULT = DEFAULT_MODEL
"""The default of :data:`Model`."""

ATTENTION_DEFAULT = "lm-infinite"
"""The default of :data:`Attention`."""


def parse_settings(settings: list[str] | None) -> dict[str, str]:
    """Turn ``["window=2048", "sinks=4"]`` into a dictionary for ``make_policy``.

    Raises
    ------
    ConfigurationError
        If one is not of the form KEY=VALUE, or a key is given twice.
    """
    parsed: dict[str, str] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigurationError(f"--set takes KEY=VALUE, such as --set window=2048; got {setting!r}")
        if key in parsed:
            raise ConfigurationError(f"--set {key} is given twice: {parsed[key]!r} and {value.strip()!r}")
        parsed[key] = value.strip()
    return parsed


def use_threads(threads: int | None) -> None:
    """Let PyTorch use this many CPU threads, if a number was given."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
