"""The page of goals: what was measured, what another script did, and llama.cpp, there or not."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.test_benchmarks
from everlong.attention import compiled_parts
from everlong.evaluation import rooflines
from everlong.kernels.loading import wanted
from everlong.kernels.team import has_team
from tests.test_benchmarks import Script, linux, measured

folder, scripts = tests.test_benchmarks.folder, tests.test_benchmarks.scripts

THEIRS = {
    "version": "0.3",
    "threads": 1,
    "decode_ms": 20.0,
    "prefill": {"24": 100.0, "48": 50.0},
}


def in_this_process(script: Script, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script run the parts that it would run in processes of their own in this one."""

    def here(path: str, *words: object, waiting: str) -> Any:
        assert Path(path).name == name and waiting == "spin briefly"
        with io.StringIO() as out, redirect_stdout(out):
            monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
            script.module.main()
            return json.loads(out.getvalue().splitlines()[-1])

    monkeypatch.setattr(script.module, "in_own_process", here)


@pytest.fixture
def goals(scripts: None, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """The script on the tiny model, with small rooflines, each part in this process; llama.cpp not there."""
    options = ["--model", str(folder / "tiny"), "--weights", "int8", "--window", "40", "--threads", "1"]
    options += ["--depths", "50", "1500", "--prompts", "24", "--longest", "48", "--repeats", "1"]
    options += ["--llama", str(tmp_path / ".venv-llama"), "--gguf", str(tmp_path / "tiny.gguf")]
    script = Script("goals", monkeypatch, tmp_path / "goals.json", *options)
    before = torch.get_num_threads()

    in_this_process(script, "goals.py", monkeypatch)
    monkeypatch.setattr(script.module, "CONTEXT", 30)
    monkeypatch.setattr(script.module, "WINDOWS_TOGETHER", (20, 30))
    monkeypatch.setattr(rooflines, "_SIDE", {"cpu": 16})
    monkeypatch.setattr(rooflines, "_BUFFER", {"cpu": 4096})
    yield script
    torch.set_num_threads(before)


@linux
def test_goals_measures_ours_and_says_that_llama_is_not_there(
    goals: Script, capsys: pytest.CaptureFixture[str]
) -> None:
    goals.run()
    ours = ["beside llama.cpp", "speed", "together, recorded", "whole stock", "whole ours"]
    assert measured(capsys) == ours and set(goals.rows) == set(ours)
    together = goals.rows["together, recorded"]
    (row,) = [cells for cells in goals.table(0) if "8 sessions" in cells[0]]
    assert row[0].endswith("20 / 30")
    assert row[3] == " / ".join(f"{8 * one / eight:.1f}x" for one, eight in together.values())
    reached = {(what, against): cells for what, against, *cells in goals.table(0)}
    theirs = [cells for (_, against), cells in reached.items() if against.startswith("llama.cpp")]
    why = "not measured: there is no environment .venv-llama; --build-llama builds it, in minutes"
    assert [cells[1] for cells in theirs] == [why, why]
    rows = goals.rows["speed"]["rows"]
    decode = " / ".join(f"{row['ratios']['decode']:.1f}x" for row in rows)
    assert reached["writing, one session, at 50 / 1,500", "stock transformers"] == ["≥ none / none", decode]
    seconds = [goals.rows[f"whole {method}"]["seconds"] for method in ("stock", "ours")]
    stock = reached["reading 1,500 tokens", "stock transformers"]
    assert stock[1].startswith(f"{seconds[0] / seconds[1]:.1f}x (")
    assert reached["state of one session", "stock cache at 1,500"] == ["≤ 1/15", "1/30.0"]
    step = reached["a step of writing", "its kernels alone"]
    assert step[1].startswith(f"{rows[1]['step_to_floor']:.2f}x as Python calls them (memory bus: ")
    assert goals.table(1)[0][0].startswith("llama.cpp: not measured")
    assert [row[0] for row in goals.table(1)[1:]] == [
        "ours, a full window of 30",
        "ours, a full window of 40",
    ]
    assert [row[0] for row in goals.table(2)] == ["50", "1,500"]


@linux
def test_goals_measures_llama_as_soon_as_it_is_there(
    goals: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    goals.run()
    capsys.readouterr()
    asked: list[Any] = []
    monkeypatch.setattr(goals.module.llama, "missing", lambda environment: None)
    monkeypatch.setattr(
        goals.module.llama, "speeds", lambda *where, **how: asked.append((where, how)) or THEIRS
    )
    goals.run()
    assert measured(capsys) == ["llama.cpp"]
    (((environment, gguf), how),) = asked
    assert environment.name == ".venv-llama" and gguf.name == "tiny.gguf"
    assert how == {"threads": 1, "repeats": 1, "prompts": [24, 48]}
    ours, rate = goals.rows["beside llama.cpp"], 1500 / goals.rows["whole ours"]["seconds"]
    first, *_ = goals.table(0)
    at = [f"{20 / ours['decode_ms'][window]:.2f}x" for window in ("30", "40")]
    assert first[3] == f"{at[0]}; in a full window of 40: {at[1]}"
    longest = next(row for row in goals.table(0) if row[1] == "llama.cpp on its largest window")
    assert longest[3] == f"{rate / 50:.1f}x ({rate:.0f} / 50 tokens/s, its 48 tokens)"
    assert goals.table(1)[0] == ["llama.cpp (0.3)", "20.0", "100", "50"]
    page = goals.output.with_suffix(".md").read_text()
    monkeypatch.setattr(goals.module.llama, "missing", lambda environment: "gone again")
    goals.run()
    assert measured(capsys) == [] and goals.output.with_suffix(".md").read_text() == page


@pytest.mark.usefixtures("scripts")
def test_a_million_tokens_are_another_scripts(tmp_path: Path) -> None:
    goals = importlib.import_module("goals")
    options = types.SimpleNamespace(output=tmp_path / "goals.json")
    assert goals.million(goals.bounded(options)) == "not measured: run bounded.py"
    row = {"milliseconds": [2.0, 2.5]}
    saved = {"rows": {"LM-Infinite": row}, "setting": {"tokens": 1000, "settled": 20}}
    (tmp_path / "bounded.json").write_text(json.dumps(saved))
    assert goals.million(goals.bounded(options)).startswith("1.25x (the 1,000th against the 20th")


@pytest.mark.usefixtures("scripts")
def test_a_step_is_set_beside_what_its_kernels_take_within_it(tmp_path: Path) -> None:
    goals = importlib.import_module("goals")
    output = tmp_path / "goals.json"
    options = types.SimpleNamespace(model="a-model", weights="int4", window=2048, output=output)
    assert goals.within_a_step(options) == "", "not profiled"
    saved = {"setting": {"model": "a-model"}, "rows": {"int4, 2048": {"besides": 0.2}}}
    (tmp_path / "profile_step.json").write_text(json.dumps(saved))
    assert goals.within_a_step(options).startswith(", 1.25x of what they take within it, [profile_step.md]")
    for other in ({"model": "another"}, {"weights": "int8"}, {"window": 1024}):
        assert goals.within_a_step(types.SimpleNamespace(**{**vars(options), **other})) == ""


# --- guessing ahead -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("scripts")
def test_speculation_writes_each_text_in_each_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(folder / "novel.txt"), "--model", str(folder / "tiny"), "--tokens", "12", "--repeats", "1"]
    script = Script("speculation", monkeypatch, tmp_path / "speculation.json", *options)
    monkeypatch.setattr(script.module, "START", 0)

    in_this_process(script, "speculation.py", monkeypatch)
    script.run()
    names = [f"{text}, {weights}" for weights in ("int4", "float") for text in ("prose", "code", "summary")]
    assert measured(capsys) == names
    for name in names[3:]:
        assert all(way["margin"] is None and way["tokens"] == 12 for way in script.rows[name].values())
        assert script.rows[name]["none"]["forwards"] >= 11
    shown = {(row[0], row[1]): row for row in script.table(0)}
    assert len(shown) == 2 * len(names)
    for name in names:
        plain, ahead = script.rows[name]["none"], script.rows[name]["lookahead"]
        row = shown[name, "lookahead"]
        assert row[2] == f"{12 / ahead['forwards']:.2f}"
        assert row[5] == f"{plain['seconds'] / ahead['seconds']:.2f}"


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("sessions", [1, 3])
def test_a_step_is_profiled_by_kinds_of_operators(
    sessions: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    profile_step = importlib.import_module("profile_step")
    found = profile_step.measure(str(folder / "tiny"), "int8", 30, sessions)
    layers = 2  # of the tiny model
    calls = {kind: count for kind, (_, count) in found["kinds"].items()}
    assert calls["attention"] == layers and calls["head"] == 1
    assert calls["products"] == 4 * layers, "layers with one input are multiplied together"
    assert calls[profile_step.OTHERS] > 20
    script = Script("profile_step", monkeypatch, tmp_path / "profile_step.json")
    monkeypatch.setattr(script.module, "in_own_process", lambda *words, waiting: found)
    script.run("--windows", "30", "50", "--together", "20")
    alone = [f"{kind}, {window}" for window in (30, 50) for kind in ("float", "int8", "int4")]
    assert measured(capsys) == [*alone, "int4, 20, 8 sessions"]
    spent = {kind: milliseconds for kind, (milliseconds, _) in found["kinds"].items()}
    step = found["step"]
    assert script.table(0)[1][1:4] == ["30", "1", f"{step:.1f}"]
    assert script.table(0)[-1][:4] == ["int4", "20", "8", f"{step:.1f}"]
    rest = step - sum(spent.values())
    assert script.table(0)[1][-2:] == [f"{rest:.1f}", f"{found['besides']:.0%}"]


@pytest.mark.usefixtures("scripts")
def test_what_is_besides_is_a_share_of_the_step_of_the_same_turn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile_step = importlib.import_module("profile_step")
    steps, spent = iter([9.9, 9.9, 9.9, 9.9, 0.010, 9.9, 0.020, 9.9, 0.040, 9.9]), iter([5.0, 19.0, 10.0])
    monkeypatch.setattr(profile_step, "REPEATS", 3)
    monkeypatch.setattr(profile_step, "decode_seconds", lambda *_: [next(steps)])
    monkeypatch.setattr(
        profile_step,
        "by_kind",
        lambda _: {kind: [next(spent) if kind == "products" else 0.0, 1.0] for kind in profile_step.KINDS},
    )
    found = profile_step.measure(str(folder / "tiny"), "int8", 30, 1)
    assert found["step"] == pytest.approx(20) and found["kinds"]["products"][0] == 10
    assert found["besides"] == pytest.approx(0.5), "of 1 - 5 / 10, 1 - 19 / 20, 1 - 10 / 40"


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("by_kernels", [False, True])
def test_reading_is_profiled_by_kinds_of_operators(
    by_kernels: bool,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if by_kernels and not (wanted() and has_team()):
        pytest.skip("there are no kernels here")
    monkeypatch.setattr(compiled_parts, "_LEAST_PRODUCTS", 0 if by_kernels else 2**40)
    script = Script("profile_read", monkeypatch, tmp_path / "profile_read.json")
    monkeypatch.setattr(script.module, "PIECE", 64)
    monkeypatch.setattr(script.module, "REPEATS", 3)
    monkeypatch.setattr(rooflines, "_SIDE", {"cpu": 16})
    monkeypatch.setattr(rooflines, "_BUFFER", {"cpu": 4096})
    in_this_process(script, "profile_read.py", monkeypatch)
    script.run("--model", str(folder / "tiny"), "--windows", "100")
    assert measured(capsys) == ["a window of 100"]
    row = script.rows["a window of 100"]
    kinds, layers = row["kinds"], 2  # of the tiny model
    assert kinds["products"]["calls"] == 7 * layers
    of_attention = ("at once", "whole", "triangle", "sinks")
    expected = [layers, 0, 0, 0] if by_kernels else [0, layers, 2 * layers, layers]
    assert [kinds[name]["calls"] for name in of_attention] == expected
    counted = sum(kind["flops"] for kind in kinds.values())
    assert counted == pytest.approx(row["flops"], rel=0.01), "as the definition counts them"
    assert kinds["others"]["calls"] > 100 and kinds["others"]["flops"] == 0
    shown = script.table(0)
    expected = [words for name, words in script.module.KINDS.items() if kinds[name]["calls"]]
    assert [line[0] for line in shown[1:-1]] == expected
    spent = sum(kind["milliseconds"] for kind in kinds.values())
    assert shown[-1][1] == f"{row['milliseconds'] - spent:.0f}"
    assert shown[0][-1] == f"{row['share']:.0%}"


# --- llama.cpp ----------------------------------------------------------------------------------------

STUB = """
__version__ = "stub"
calls = []
class Llama:
    def __init__(self, path, **options):
        self.n_tokens, self.ctx, self.options = 0, "context", options
        calls.append((path, options))
    def n_vocab(self):
        return 100
    def reset(self):
        self.n_tokens = 0
    def eval(self, tokens):
        assert all(0 <= token < 100 for token in tokens)
        calls.append((self.n_tokens, len(tokens)))
        self.n_tokens += len(tokens)
def llama_synchronize(context):
    assert context == "context"
"""


@pytest.fixture
def environment(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose Python finds a stub of llama_cpp, once it is written."""
    folder = tmp_path / ".venv-llama"
    python = importlib.import_module("llama").python_of(folder)
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    (tmp_path / "packages").mkdir()
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="makes links")
def test_llama_is_found_asked_and_missed(environment: Path, tmp_path: Path) -> None:
    llama = importlib.import_module("llama")
    assert "there is no environment other" in llama.missing(tmp_path / "other")
    assert "No module named 'llama_cpp'" in llama.missing(environment)
    (tmp_path / "packages" / "llama_cpp.py").write_text(STUB)
    assert llama.missing(environment) is None
    found = llama.speeds(environment, tmp_path / "m.gguf", threads=3, repeats=2, prompts=[5, 9000])
    assert (found["version"], found["threads"]) == ("stub", 3)
    assert found["decode_ms"] > 0 and found["prefill"].keys() == {"5", "9000"}


@pytest.mark.usefixtures("scripts")
def test_llama_writes_from_the_same_place_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stub = types.ModuleType("llama_cpp")
    exec(STUB, stub.__dict__)
    monkeypatch.setitem(sys.modules, "llama_cpp", stub)
    llama = importlib.import_module("llama")
    options = argparse.Namespace(
        gguf=Path("m.gguf"), threads=3, repeats=2, context=10, steps=3, prompts=[5, 50]
    )
    found = llama.measure(options)
    ways = [call for call in stub.calls if isinstance(call[0], str)]
    assert [way[1]["flash_attn"] for way in ways] == [False, True]
    assert {(way[1]["n_threads"], way[1]["n_threads_batch"], way[1]["n_ctx"]) for way in ways} == {
        (3, 3, 50 + llama.SPARE)
    }
    one = [(0, 5), (0, 5), (0, 50), (0, 10), *2 * [(10, 1), (11, 1), (12, 1)]]
    assert [call for call in stub.calls if call not in ways] == 2 * one
    assert found["decode_ms"] == min(found["decode_ms_of"])
    assert found["prefill"][5] == max(each[5] for each in found["prefill_of"])
