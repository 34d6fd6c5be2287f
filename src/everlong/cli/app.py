"""The ``everlong`` command: finds the command files beside it, and turns errors into one line.

A command file is called ``<something>_command.py`` or ``<something>_commands.py`` and has ``register(app)``,
which adds its commands to the app. It imports PyTorch and the like inside its functions only: all command
files are imported at every start, and ``everlong --help`` is to answer at once.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from collections.abc import MutableMapping, Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.main

import everlong.cli
from everlong import __version__
from everlong.cli.terminal import print_error
from everlong.errors import EverlongError

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
"""Exit codes: a mistake of ours, bad input, Ctrl-C."""

SPIN_COUNT = 5000
"""Turns of a waiting loop before a thread goes to sleep; see benchmarks/results/writing.md."""

_ORDER = (
    *("demo", "read", "chat", "ask", "generate", "memorize", "memory", "compare", "methods"),
    *("models", "pull", "remove"),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"everlong {__version__}")
        raise typer.Exit


def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Endless context for any off-the-shelf language model."""


def build_app() -> typer.Typer:
    """Make the app with the commands of every command file, the common ones first."""
    app = typer.Typer(
        name="everlong",
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_global_options)
    for module in pkgutil.iter_modules(everlong.cli.__path__):
        if module.name.endswith(("_command", "_commands")):
            importlib.import_module(f"everlong.cli.{module.name}").register(app)

    def position(command: Any) -> int:
        name = command.name or command.callback.__name__.replace("_", "-")
        return _ORDER.index(name) if name in _ORDER else len(_ORDER)

    app.registered_commands.sort(key=position)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    Parameters
    ----------
    arguments : sequence of str
        Without the program's name. ``--debug`` may stand anywhere before ``--``.
    """
    before, dashes, after = _split(list(arguments), "--")
    debug = "--debug" in before
    try:
        command = typer.main.get_command(build_app())
        words = [word for word in before if word != "--debug"] or ["--help"]
        result = command.main(args=[*words, *dashes, *after], prog_name="everlong", standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
        if code == INTERRUPTED:
            print_error("everlong: interrupted")
        return code
    except (KeyboardInterrupt, typer.Abort):
        print_error("everlong: interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _explain(error)


def main() -> NoReturn:
    """Run the command line of this process, and exit."""
    let_threads_spin_briefly(os.environ)
    sys.exit(run(sys.argv[1:]))


def let_threads_spin_briefly(environment: MutableMapping[str, str]) -> None:
    """Have PyTorch's threads wait awake for some microseconds before they sleep, unless told otherwise.

    Waking a thread takes longer than most products of a decode step, and a thread that never sleeps takes
    the time of others on a busy machine. Read once, by the OpenMP library that comes with PyTorch.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(environment):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def _explain(error: Exception) -> int:
    """Print an error as one line and return the exit code."""
    if isinstance(error, EverlongError):
        print_error(f"everlong: {error}")
        return REFUSED
    usage = getattr(error, "format_message", None)
    if usage is not None:  # the command line itself is wrong
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "everlong"
        print_error(f"{command}: {usage()} (see `{command} --help`)")
        return REFUSED
    print_error(f"everlong: unexpected {type(error).__name__}: {error} (--debug shows where)")
    return FAILED


def _split(words: list[str], at: str) -> tuple[list[str], list[str], list[str]]:
    if at not in words:
        return words, [], []
    index = words.index(at)
    return words[:index], [at], words[index + 1 :]
