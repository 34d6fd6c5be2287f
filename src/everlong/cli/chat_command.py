"""``everlong chat``: talk with a model, without end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

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
from everlong.cli.session_options import (
    account,
    check_state,
    in_words,
    open_llm,
    open_session,
    print_as_written,
    say_memory,
)
from everlong.cli.terminal import notes, print_error
from everlong.errors import EverlongError, InputError
from everlong.registry import unknown_name

if TYPE_CHECKING:
    from everlong.reading.session import Session


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("chat")(grouped(chat))


def chat(
    model: ModelOptions,
    method: MethodOptions,
    below: TierOptions,
    writing: WritingOptions,
    output_options: OutputOptions,
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="FILE", help="Go on from this file if it is there, and save to it at the end."
        ),
    ] = None,
    system: System = None,
    memory: MemoryOption = None,
    weights: WeightsOption = "auto",
) -> None:
    """Talk with a model, one message a line, for as long as you like.

    Lines that begin with a slash are commands: `/help` lists them. Ctrl-D ends the chat, Ctrl-C an answer.
    With `--json` each answer is one line of JSON.
    """
    arguments = writing.arguments()
    console = notes(quiet=output_options.quiet)
    check_state(state)
    with open_llm(model, method, weights=weights, quiet=output_options.quiet, below=below) as llm:
        is_restored = state is not None and state.exists()
        session = open_session(
            llm, method, system=system, state=state, seed=writing.seed, memories=memory, below=below
        )
        console.print(
            f"{llm.name}, {session.policy}, weights={llm.weights!r}",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
        try:
            _Chat(
                session,
                system,
                arguments,
                console,
                is_restored=is_restored,
                as_json=output_options.as_json,
            ).run()
        finally:
            if state is not None:
                session.save(state)
                console.print(f"saved to {state}", markup=False, soft_wrap=True)


class _Chat:
    """The loop of messages, and what the slash commands do."""

    def __init__(
        self,
        session: Session,
        system: str | None,
        arguments: dict[str, Any],
        console: Console,
        *,
        is_restored: bool,
        as_json: bool,
    ) -> None:
        self._session = session
        self._is_restored = is_restored
        self._system = system
        self._arguments = arguments
        self._console = console
        self._as_json = as_json
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/read": ("/read FILE      read a file into the conversation", self._read),
            "/save": ("/save FILE      save the conversation; go on with --state FILE", self._save),
            "/stats": ("/stats          what was read, kept and forgotten", self._stats),
            "/reset": ("/reset          begin again", self._reset),
            "/help": ("/help           this list", self._help),
            "/exit": ("/exit           end, as Ctrl-D does", self._help),
        }

    def run(self) -> None:
        """Take messages until there are no more. A mistake in one, or Ctrl-C, does not end the chat."""
        while (message := _next_message()) not in (None, "/exit"):
            try:
                if message.startswith("/"):
                    self._command(message)
                elif message:
                    self._say(message)
            except EverlongError as error:
                print_error(f"everlong: {error}")
            except KeyboardInterrupt:
                self._console.print("(interrupted; what was read and written stays)", style="dim")

    def _say(self, message: str) -> None:
        pieces = self._session.stream_answer(message, keep=True, **self._arguments)
        result = print_as_written(pieces, silent=self._as_json)
        say_memory(self._console, self._session, result)
        if self._as_json:
            answer = {
                "message": message,
                "answer": result.text,
                "tokens": result.tokens,
                "seconds": result.seconds,
                "stop_reason": result.stop_reason,
                "memories": result.memories,
                "stats": account(result.stats),
            }
            print(json.dumps(answer, ensure_ascii=False), flush=True)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise unknown_name("command", name, list(self._commands))
        self._commands[name][1](rest.strip())

    def _read(self, name: str) -> None:
        from everlong.cli.reading_bars import ReadingBars

        if not name:
            raise InputError("/read needs the name of a text file: /read notes.txt")
        with ReadingBars(self._console) as bars:
            report = self._session.read(Path(name).expanduser(), progress=partial(bars.reading, name))
        self._console.print(f"{report.tokens:,} tokens read", style="dim")

    def _save(self, name: str) -> None:
        if not name:
            raise InputError("/save needs the name of a file: /save talk.state")
        self._session.save(Path(name).expanduser())
        self._console.print(f"saved to {name}", style="dim", markup=False)

    def _stats(self, _: str) -> None:
        self._console.print(in_words(self._session.stats), style="dim", soft_wrap=True)

    def _reset(self, _: str) -> None:
        self._session.reset()
        if self._system is not None:
            self._session.pin(self._system)
        elif self._is_restored:
            self._console.print("(instructions pinned before the state was saved are gone)", style="dim")

    def _help(self, _: str) -> None:
        for explanation, _action in self._commands.values():
            self._console.print(explanation, style="dim", markup=False)


def _next_message() -> str | None:
    """Return the next line of standard input without blanks around it; None at its end."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 gives input() a line editor and a history

        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
