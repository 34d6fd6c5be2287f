import subprocess
import sys

import pytest
import typer

from everlong import __version__
from everlong.cli import app as app_module
from everlong.cli.app import build_app, run
from everlong.cli.options import parse_settings
from everlong.errors import ConfigurationError, InputError


@pytest.fixture
def with_commands(monkeypatch):
    """An app with commands that fail in the ways commands fail."""

    def refuse():
        raise InputError("the text\nhas no end; cut it")

    def interrupt():
        raise KeyboardInterrupt

    def break_down():
        raise RuntimeError("boom")

    def leave():
        raise typer.Exit(3)

    def build():
        app = build_app()
        for name, command in (
            ("refuse", refuse),
            ("interrupt", interrupt),
            ("break-down", break_down),
            ("leave", leave),
        ):
            app.command(name)(command)
        return app

    monkeypatch.setattr(app_module, "build_app", build)


def last_words(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_the_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"everlong {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_arguments_it_shows_its_commands(capsys, arguments):
    assert run(arguments) == 0
    shown = capsys.readouterr()
    assert all(command in shown.out for command in ("models", "pull", "remove")) and not shown.err


def test_our_errors_are_one_line_and_exit_code_two(with_commands, capsys):
    assert run(["refuse"]) == 2
    assert last_words(capsys) == "everlong: the text has no end; cut it"


@pytest.mark.parametrize("arguments", [["--debug", "refuse"], ["refuse", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(with_commands, capsys, arguments):
    assert run(arguments) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("everlong: the text has no end; cut it\n")


def test_ctrl_c_is_exit_code_130(with_commands, capsys):
    assert run(["interrupt"]) == 130
    assert last_words(capsys) == "everlong: interrupted"


def test_a_mistake_of_ours_is_one_line_too_but_another_code(with_commands, capsys):
    assert run(["break-down"]) == 1
    assert last_words(capsys) == "everlong: unexpected RuntimeError: boom (--debug shows where)"


def test_a_command_chooses_its_own_exit_code(with_commands, capsys):
    assert run(["leave"]) == 3


def test_an_unknown_command_is_answered_with_near_ones(capsys):
    assert run(["modles"]) == 2
    assert "Did you mean 'models'" in last_words(capsys)


def test_an_unknown_option_is_answered_with_near_ones(capsys):
    assert run(["pull", "--accept-term"]) == 2
    words = last_words(capsys)
    assert words.startswith("everlong pull: No such option: --accept-term") and "--accept-terms" in words


def test_errors_are_red_on_a_terminal_and_plain_elsewhere(with_commands, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    run(["refuse"])
    assert "\x1b[1;31m" in capsys.readouterr().err
    monkeypatch.delenv("FORCE_COLOR")
    run(["refuse"])
    assert "\x1b" not in capsys.readouterr().err


def test_settings_are_key_equals_value():
    assert parse_settings(["window=2048", " sinks = 4", "ceiling=a=b"]) == {
        "window": "2048",
        "sinks": "4",
        "ceiling": "a=b",
    }
    assert parse_settings(None) == {}


@pytest.mark.parametrize("wrong", [["window"], ["=3"], ["window=1", "window=2"]])
def test_settings_of_another_form_are_refused(wrong):
    with pytest.raises(ConfigurationError, match="--set"):
        parse_settings(wrong)


def test_help_does_not_wait_for_pytorch():
    script = (
        "import sys; from everlong.cli.app import run; code = run(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "given, spin",
    [({}, "5000"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, "7")],
)
def test_threads_spin_briefly_unless_told_otherwise(given, spin):
    environment = dict(given)
    app_module.let_threads_spin_briefly(environment)
    assert environment.get("GOMP_SPINCOUNT") == spin


def test_it_runs_as_a_module():
    command = [sys.executable, "-m", "everlong", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == f"everlong {__version__}\n"
