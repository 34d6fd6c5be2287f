import io
import json
import subprocess
import sys

import pytest

from everlong.cli import memory_commands
from everlong.cli.app import run
from everlong.memory.pairs import Pair
from everlong.memory.store import MemoryStore
from tests.memory.adapters import lora, record

PAIRS = [Pair(f"Who keeps bee {n}?", " Orla [Finch]", "questions") for n in range(5)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Two memories where the commands look for them."""
    monkeypatch.setenv("EVERLONG_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    made = MemoryStore()
    made.add(record("handbook"), lora(), PAIRS)
    made.add(record("harbour", recall=None), lora(1), PAIRS[:1])
    return made


@pytest.fixture
def terminal(monkeypatch):
    """Somebody who answers."""

    def answering(text):
        monkeypatch.setattr(memory_commands, "is_interactive", lambda: True)
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return answering


def names(store):
    return [memory.name for memory in store.list()]


def test_list_shows_sound_and_broken_ones(store, capsys):
    (store.folder / "harbour" / "memory.json").write_text("{")
    assert run(["memory", "list"]) == 0
    shown = capsys.readouterr()
    rows = {row.split()[0]: row for row in shown.out.splitlines()}
    assert all(word in rows["handbook"] for word in ("lora", "tiny", " 8 ", " 20 ", " 5 ", "80% questions"))
    assert rows["harbour"].startswith("harbour is broken:") and "memory.json" in rows["harbour"]
    assert str(store.folder) in shown.err
    run(["memory", "list", "--quiet"])
    assert capsys.readouterr().err == ""


def test_an_empty_store_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EVERLONG_HOME", str(tmp_path))
    assert run(["memory", "list"]) == 0
    shown = capsys.readouterr()
    assert not shown.out and "there are no memories in" in shown.err
    assert not (tmp_path / "memories").exists()


def test_list_as_json(store, capsys):
    (store.folder / "harbour" / "memory.json").write_text("{")
    assert run(["memory", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    (memory,) = listed["memories"]
    assert memory["name"] == "handbook" and memory["pairs"] == 5 and memory["rank"] == 8
    assert memory["recall"] == {"questions": 0.8} and memory["bytes_on_disk"] == store.get("handbook").bytes
    assert listed["broken"][0]["name"] == "harbour" and listed["folder"] == str(store.folder)


def test_show_tells_source_recipe_recall_and_who_can_serve_it(store, capsys):
    assert run(["memory", "show", "handbook"]) == 0
    shown = capsys.readouterr()
    for words in ("lora, rank 8", "20 tokens", "infinite-icl: rate 0.001", "80% questions", "as it is"):
        assert words in shown.out
    assert "5 pairs" in shown.err and shown.err.count("Orla [Finch]") == 3
    assert run(["memory", "show", "handbook", "--json", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["not_served_by_vllm"] == [] and not shown.err
    run(["memory", "show", "harbour"])
    assert "not measured" in capsys.readouterr().out


def test_show_tells_what_was_measured(store, capsys):
    worth = {
        "cloze": {"pairs": 39, "gain": 4.1, "gain_low": 3.8, "gain_high": 4.5},
        "questions": {"pairs": 1, "gain": 7.0, "asked": 36, "reading": 17, "without": 3},
    }
    store.add(record("tea", measured={"worth": worth, "sentences": 20, "uncovered": 1}), lora(2))
    assert run(["memory", "show", "tea"]) == 0
    shown = capsys.readouterr().out
    assert "cloze: 4.10 nats per token (3.80 to 4.50) of 39 pairs" in shown
    assert "questions: 7.00 nats per token of 1 pairs, 17 of 36 answered reading, 3 without" in shown
    assert "19 of 20 sentences" in shown


def test_a_record_from_before_anything_was_measured_is_read(store):
    path = store.folder / "handbook" / "memory.json"
    values = json.loads(path.read_text())
    del values["measured"]
    path.write_text(json.dumps(values))
    assert store.get("handbook").record.measured is None


def test_delete_asks_first(store, terminal, capsys):
    terminal("n\n")
    assert run(["memory", "delete", "handbook"]) == 0
    assert "handbook is kept" in capsys.readouterr().err and "handbook" in names(store)
    terminal("y\n")
    assert run(["memory", "delete", "handbook"]) == 0
    assert "deleted handbook" in capsys.readouterr().err and names(store) == ["harbour"]


def test_without_a_terminal_delete_names_the_flag(store, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run(["memory", "delete", "handbook"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "everlong memory delete handbook --yes" in lines[0]
    assert "handbook" in names(store)


def test_delete_without_asking(store, capsys):
    freed = store.get("handbook").bytes
    assert run(["memory", "delete", "handbook", "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"deleted": "handbook", "bytes": freed}
    (store.folder / "harbour" / "memory.json").write_text("{")
    assert run(["memory", "delete", "harbour", "-y", "-q"]) == 0
    shown = capsys.readouterr()
    assert shown.out == shown.err == "" and not (store.folder / "harbour").exists()


def test_rename(store, capsys):
    assert run(["memory", "rename", "handbook", "manual"]) == 0
    assert "handbook is now called manual" in capsys.readouterr().err
    assert names(store) == ["harbour", "manual"]
    assert run(["memory", "rename", "manual", "harbour"]) == 2
    assert "already" in capsys.readouterr().err
    assert run(["memory", "rename", "manual", "book", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "book"


def test_merge(store, capsys):
    assert run(["memory", "merge", "handbook", "harbour", "--into", "all", "--weights", "1,-0.5"]) == 0
    assert "handbook and harbour are merged into all exactly, rank 16" in capsys.readouterr().err
    assert store.get("all").record.recipe.values["weights"] == [1.0, -0.5]
    assert run(["memory", "merge", "handbook", "harbour", "--into", "all"]) == 2
    assert "already" in capsys.readouterr().err
    assert run(["memory", "merge", "handbook", "harbour", "--into", "all", "--replace", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["values"]["weights"] == [1.0, 1.0]


@pytest.mark.parametrize("weights, reason", [("1,x", "such as 1,0.5"), ("1", "1 numbers for 2 memories")])
def test_weights_that_do_not_fit_are_one_line(store, capsys, weights, reason):
    assert run(["memory", "merge", "handbook", "harbour", "--into", "all", "--weights", weights]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and reason in lines[0]


def test_merging_above_the_largest_rank_tells_the_error(store, capsys):
    store.add(record("wide", rank=128), lora(2, r=128))
    assert run(["memory", "merge", "handbook", "wide", "--into", "all"]) == 0
    assert "with a relative error of 0.00%, rank 128" in capsys.readouterr().err


def test_export(store, tmp_path, capsys):
    assert run(["memory", "export", "handbook", str(tmp_path / "copy")]) == 0
    assert str(tmp_path / "copy") in capsys.readouterr().err
    assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()
    assert run(["memory", "export", "handbook", str(tmp_path / "copy")]) == 2
    assert "exists: name a folder that does not" in capsys.readouterr().err
    assert run(["memory", "export", "handbook", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "other")
    run(["memory", "export", "--help"])
    assert "No GGUF" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show", "delete", "export"])
def test_an_unknown_memory_is_one_line_with_near_names(store, capsys, command):
    assert run(["memory", command, "handbok", *(["/nowhere"] if command == "export" else [])]) == 2
    assert (
        capsys.readouterr().err
        == "everlong: unknown memory 'handbok'; did you mean 'handbook' or 'harbour'?\n"
    )


def test_a_broken_memory_is_one_line(store, capsys):
    (store.folder / "handbook" / "adapter_model.safetensors").write_bytes(b"")
    assert run(["memory", "show", "handbook"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "is damaged" in lines[0]


def test_listing_does_not_wait_for_pytorch(store):
    script = (
        "import sys; from everlong.cli.app import run; code = run(['memory', 'list'])\n"
        "heavy = {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and "handbook" in result.stdout, result.stderr


def test_the_group_by_itself_lists_its_commands(capsys):
    run(["memory"])
    shown = capsys.readouterr()
    assert all(
        word in shown.out + shown.err for word in ("list", "show", "delete", "rename", "merge", "export")
    )
