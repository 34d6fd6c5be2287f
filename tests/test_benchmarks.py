"""Each benchmark script, as small as it goes: rows are written, kept and taken up again, and shown."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everlong.attention import LMInfinite, Policy, attach
from everlong.evaluation.resources import machine_line
from tests.tiny import byte_llama

FOLDER = Path(__file__).parent.parent / "benchmarks"
TEXT = "It is a truth universally acknowledged, that a single man must be in want of a wife. " * 12
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, and a novel beside it."""
    folder = tmp_path_factory.mktemp("benchmarks")
    model, tokenizer = byte_llama()
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    (folder / "novel.txt").write_text(TEXT)
    return folder


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts can be imported, for this test only."""
    names = ("common", "speed", "bounded", "real_text", "weights", "writing", "goals", "llama", "start_up")
    names += (
        "speculation",
        "profile_step",
        "profile_read",
        "together",
        "memories",
        "naive",
        "passkey",
        "methods",
        "needle",
        "reading_rate",
        "prefetch",
        "default_writing",
    )
    memories = ("facts", "skills", "grounded", "sequence", "cost", "routing", "passing")
    names += tuple(f"memory_{name}" for name in memories)
    assert not set(names) & set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in names:
        sys.modules.pop(name, None)


class Script:
    """A script of `benchmarks/`, run in this process with options that stay the same."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> None:
        self.module: Any = importlib.import_module(name)
        self.output = output
        self._argv = [f"{name}.py", "--output", str(output), *options]
        self._monkeypatch = monkeypatch

    def run(self, *more: str) -> None:
        self._monkeypatch.setattr(sys, "argv", [*self._argv, *more])
        self.module.main()

    @property
    def saved(self) -> Any:
        return json.loads(self.output.read_text())

    @property
    def rows(self) -> dict[str, Any]:
        rows: dict[str, Any] = self.saved["rows"]
        return rows

    def table(self, number: int) -> list[list[str]]:
        """The cells of the page's tables below their headings."""
        blocks = self.output.with_suffix(".md").read_text().split("\n\n")
        tables = [block.splitlines()[2:] for block in blocks if block.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[number]]


def measured(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was measured since this was last asked."""
    lines = capsys.readouterr().out.splitlines()
    return [line[len("measuring ") : -len(" …")] for line in lines if line.startswith("measuring ")]


# --- rows ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("scripts")
def test_rows_survive_an_interruption_and_another_setting(tmp_path: Path) -> None:
    rows_of = importlib.import_module("common").Rows
    path = tmp_path / "new" / "rows.json"

    def interrupted() -> Any:
        raise InterruptedError

    rows = rows_of(path, {"windows": (1, 2)})
    assert rows.get("a", lambda: [1, 2]) == [1, 2]
    with pytest.raises(InterruptedError):
        rows.get("b", interrupted)
    again = rows_of(path, {"windows": (1, 2)})
    assert again.get("a", interrupted) == [1, 2] and again.get("b", lambda: 3) == 3
    assert json.loads(path.read_text())["rows"] == {"a": [1, 2], "b": 3}
    with pytest.raises(SystemExit, match="rows of another setting"):
        rows_of(path, {"windows": (1, 3)})


@pytest.mark.usefixtures("scripts")
def test_the_page_names_the_machine_that_measured_its_rows(tmp_path: Path) -> None:
    common = importlib.import_module("common")
    path = tmp_path / "rows.json"
    common.Rows(path, {}).get("a", lambda: 1)
    saved = json.loads(path.read_text())
    saved["machine"] |= {"gpu": None, "cpu": "A Machine Of Long Ago"}
    path.write_text(json.dumps(saved))
    common.Rows(path, {}).write_table("Title", common.table(["x", "y"], [["1", "2"]]))
    page = path.with_suffix(".md").read_text()
    assert page == f"# Title\n\n{machine_line(saved['machine'])}\n\n| x | y |\n| --- | ---: |\n| 1 | 2 |\n"
    assert "A Machine Of Long Ago" in page


# --- speed --------------------------------------------------------------------------------------------


@linux
@pytest.mark.usefixtures("scripts")
def test_speed_measures_both_and_shows_what_it_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--window", "40", "--depths", "1500", "--prompts", "24"]
    speed = Script("speed", monkeypatch, tmp_path / "speed.json", *options, "--repeats", "1")
    speed.run()
    assert measured(capsys) == [
        "prompt of 24",
        "at 1500",
        "whole stock 1500",
        "whole ours 1500",
        "packed at 1500",
    ]
    before, page = speed.saved, speed.output.with_suffix(".md").read_text()

    deep, short = speed.rows["at 1500"], speed.rows["prompt of 24"]
    wholes = [speed.rows[f"whole {method} 1500"] for method in ("stock", "ours")]
    a_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dimensions, bytes
    assert deep["bytes"] == [whole["bytes"] for whole in wholes] == [1500 * a_token, (40 + 10) * a_token]
    rates = [deep[name]["prefill_tokens_per_second"] for name in ("stock", "ours")]
    steps = [deep[name]["decode_ms"] for name in ("stock", "ours")]
    seconds, peaks = ([whole[key] for whole in wholes] for key in ("seconds", "peak"))
    prefill, decode = short["prefill"], short["decode"]
    assert min(rates + steps + prefill + decode + seconds) > 0
    held = [f"{held / 2**20:.0f}" for held in deep["bytes"]]
    first, packed = speed.table(0)
    assert packed[0] == "1,500, ours int4"
    assert [first] == [
        ["1,500", *(f"{x:.0f}" for x in rates), f"{rates[1] / rates[0]:.2f}"]
        + [*(f"{x:.1f}" for x in steps), f"{steps[0] / steps[1]:.2f}", *held, "30.0"]
    ]
    assert speed.table(1) == [
        ["24", *(f"{24 / x:.0f}" for x in prefill), f"{prefill[0] / prefill[1]:.2f}"]
        + [*(f"{1000 * x:.1f}" for x in decode), f"{decode[0] / decode[1]:.2f}"]
    ]
    assert speed.table(2) == [
        ["1,500", *(f"{x:.0f}" for x in seconds), f"{seconds[0] / seconds[1]:.2f}"]
        + [*(f"{x / 2**20:.0f}" for x in peaks), f"{peaks[0] / peaks[1]:.1f}"]
    ]

    for name in ("rates", "decode_seconds", "fill"):
        monkeypatch.setattr(speed.module, name, None)
    monkeypatch.setattr(subprocess, "run", None)
    speed.run()
    assert measured(capsys) == []
    assert speed.saved == before and speed.output.with_suffix(".md").read_text() == page


# --- bounded ------------------------------------------------------------------------------------------


@pytest.fixture
def bounded(scripts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A stream of 1,400 tokens in chunks of 10, in a process whose memory does not grow."""
    options = ["--tokens", "1400", "--settled", "300", "--window", "16"]
    script = Script("bounded", monkeypatch, tmp_path / "bounded.json", *options)
    monkeypatch.setattr(script.module, "CHUNK", 10)
    monkeypatch.setattr(script.module, "resident_bytes", lambda: 2**30)
    return script


def test_bounded_compares_a_settled_stream_with_its_end(
    bounded: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bounded.run()
    assert measured(capsys) == ["LM-Infinite"]
    before = bounded.saved
    row = bounded.rows["LM-Infinite"]
    held = 2 * 2 * 2 * 16 * 4 * (16 + 10)  # layers, keys and values, heads, dimensions, bytes
    assert row["reported"] == row["held"] == [held, held]
    first, last = row["milliseconds"]
    resident, reported, tensors, chunk = bounded.table(0)
    assert resident[1:] == ["1024.0", "1024.0", "+0.00%"]
    assert reported[1:3] == tensors[1:3] == [f"{held:,}"] * 2
    assert chunk[1:] == [f"{first:.2f}", f"{last:.2f}", f"{last / first - 1:+.1%}"]
    monkeypatch.setattr(bounded.module, "measure", None)
    bounded.run()
    assert measured(capsys) == [] and bounded.saved == before


def test_bounded_fails_when_memory_grows(bounded: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([1000, 1011])
    monkeypatch.setattr(bounded.module, "resident_bytes", lambda: next(sizes))
    with pytest.raises(SystemExit, match="not bounded"):
        bounded.run()
    assert bounded.table(0)[0][-1] == "+1.10%"


def test_bounded_fails_when_more_is_held_than_reported(
    bounded: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = bounded.module.held_bytes
    monkeypatch.setattr(bounded.module, "held_bytes", lambda cache: held(cache) + 4)
    with pytest.raises(SystemExit, match="not bounded"):
        bounded.run()


@pytest.mark.usefixtures("scripts")
def test_held_bytes_finds_a_tensor_wherever_a_cache_keeps_it() -> None:
    held_bytes = importlib.import_module("bounded").held_bytes
    model, _ = byte_llama()
    with attach(model, LMInfinite(window=20, sinks=3, top_k=2, top_k_layers=0)) as handle:
        cache = handle.new_cache()
        with torch.no_grad():
            handle.decoder(torch.arange(60)[None], **{handle.cache_argument: cache}, use_cache=True)
        before = held_bytes(cache)
        assert before == sum(cache.bytes().values())
        cache.memories[1].forgotten_by_the_account = [{"deep": torch.zeros(100)[:1]}]
        assert held_bytes(cache) == before + 400  # the whole storage


# --- real text ----------------------------------------------------------------------------------------


@torch.no_grad()
def surprisal(ids: Tensor, policy: Policy | None = None) -> Tensor:
    """Each token's surprisal, all at once, by the stock model or under a policy."""
    model, _ = byte_llama()
    with nullcontext() if policy is None else attach(model, policy):
        logs = model(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    return torch.cat((torch.full((1,), math.nan), -logs[:-1].gather(-1, ids[1:, None])[:, 0]))


@pytest.mark.usefixtures("scripts")
def test_real_text_compares_with_a_model_that_reads_its_window_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(folder / "novel.txt"), "--model", str(folder / "tiny"), "--tokens", "600"]
    options += ["--windows", "90", "--bucket", "200", "--anchors", "3", "--after", "100"]
    script = Script("real_text", monkeypatch, tmp_path / "real.json", *options)
    script.run("--only", "stock", "LM-Infinite, 90")
    assert measured(capsys) == ["stock", "LM-Infinite, 90"]
    script.run()
    policies = script.module.methods(90)
    assert measured(capsys) == [*(f"{name}, 90" for name in list(policies)[1:]), "re-reading, 90"]
    before = script.saved

    ids = torch.tensor(list(TEXT.encode()[:600]))
    whole, anchors = surprisal(ids), [100, 318, 536]
    assert script.saved["setting"]["anchors"] == anchors
    stock = [float(whole[begin : begin + 200].nanmean().exp()) for begin in (0, 200, 400)]
    assert [ppl for _, ppl, *_ in script.rows["stock"]["buckets"]] == pytest.approx(stock, rel=1e-3)
    read: dict[str, Policy | None] = {f"{name}, 90": policy for name, policy in policies.items()}
    for key, policy in [("stock", None), *read.items()]:
        alone = surprisal(ids, policy)
        expected = [float(alone[at : at + 64].mean()) for at in anchors]
        assert script.rows[key]["anchors"] == pytest.approx(expected, rel=1e-4)
    assert len({script.rows[key]["anchors"][-1] for key in before["rows"]}) == len(policies) + 2
    reread = [float(surprisal(ids[at - 26 : at + 64])[-64:].mean()) for at in anchors]
    assert script.rows["re-reading, 90"]["anchors"] == pytest.approx(reread, rel=1e-4)

    shown = {method: cells for method, *cells in script.table(0)}
    assert shown.keys() == {"stock", *(f"{name}, 90" for name in policies)}
    for key, cells in shown.items():
        values = [ppl for _, ppl, *_ in script.rows[key]["buckets"]]
        assert cells == [f"{ppl:.1f}" if ppl < 1000 else f"{ppl:,.0f}" for ppl in values]
    assert [script.module.number(value) for value in (123.45, 999.0, 1000.0)] == ["123.5", "999.0", "1,000"]
    assert [key for key, *_ in script.table(1)] == [f"{name}, 90" for name in policies]
    for key, ours, theirs, difference, interval in script.table(1):
        pairs = zip(script.rows[key]["anchors"], reread, strict=True)
        differences = [a - b for a, b in pairs]
        mean = sum(differences) / 3
        half = 4.3027 * math.sqrt(sum((d - mean) ** 2 for d in differences) / 2 / 3)
        assert float(ours) == pytest.approx(sum(script.rows[key]["anchors"]) / 3, abs=1e-3)
        assert float(theirs) == pytest.approx(sum(reread) / 3, abs=1e-3)
        assert float(difference) == pytest.approx(mean, abs=1e-3)
        low, high = (float(bound) for bound in interval.split(" to "))
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=2e-3)

    monkeypatch.setattr(script.module, "read_stream", None)
    script.run()
    assert measured(capsys) == [] and script.saved == before


# --- passkeys -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("scripts")
def test_passkeys_are_looked_for_text_by_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--lengths", "900", "800", "--digits", "7", "--samples", "2"]
    options += ["--window", "400", "--text", "library"]
    script = Script("passkey", monkeypatch, tmp_path / "passkey.json", *options)
    small = {"sinks": 16, "recalled": 128}
    ways = {"stock": ("stock", {}), "last": ("last", {}), "inf-llm": ("inf-llm", small)}
    monkeypatch.setattr(script.module, "WAYS", ways)
    script.run("--ways", "last")
    assert measured(capsys) == [f"last; 7 digits in {n}, {s}" for n in (800, 900) for s in (0, 1)]
    script.run("--ways", *ways)
    assert len(measured(capsys)) == 8
    assert script.table(0) == [[way, "0 of 2 (0 to 66) [0]", "0 of 2 (0 to 66) [0]"] for way in ways]
    costs = {row[0]: row[1:4] for row in script.table(1)}
    assert costs["stock"] == ["900", "900", "0"] and costs["last"] == ["400", "400", "500"]
    assert costs["inf-llm"] == ["900", "400", "0"]
    monkeypatch.setattr(script.module, "look", None)
    script.run()
    assert measured(capsys) == []


@linux
@pytest.mark.usefixtures("scripts")
def test_methods_are_measured_by_the_command_and_shown_side_by_side(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [
        "--model",
        str(folder / "tiny"),
        "--lengths",
        "900,1000",
        "--samples",
        "2",
        "--tasks",
        "passkey,fwe",
    ]
    options += [
        "--methods",
        "recall,snap-kv",
        "--set",
        "window=400",
        "--set",
        "budget=400",
        "--set",
        "sinks=4",
    ]
    script = Script("methods", monkeypatch, tmp_path / "methods.html", *options)
    script.run()
    ways = ["stock", "last", "first-and-last", "recall", "snap-kv"]
    for told in (script.table(0), script.table(2)):
        assert [way for way, *_ in told] == [*ways[:-1], "snap-kv*"], "it knew the question"
        assert {cell for _, *cells in told for cell in cells} == {"0 of 2 [0]"}
    for length, costs in (("900", script.table(1)), ("1,000", script.table(3))):
        assert [(way, read) for way, read, *_ in costs] == [
            *zip(ways, [length, "400", "400", length, length], strict=True)
        ]
    page = script.output.with_suffix(".md").read_text()
    assert "## 1,000 tokens" in page and page.startswith("# Methods side by side")
    assert "--set window=400" in page, "what was measured, as a command"
    assert script.output.read_text().startswith("<!DOCTYPE html>")
    monkeypatch.setattr(script.module.subprocess, "run", lambda _: subprocess.CompletedProcess([], 0))
    script.output.with_suffix(".md").unlink()
    script.run()
    assert script.output.with_suffix(".md").read_text() == page, "of what was measured into the file"
    data = script.output.with_suffix(".json")
    saved = json.loads(data.read_text())
    row = next(key for key in saved["rows"] if key.startswith("recall") and key.endswith("1 of 2"))
    elsewhere = saved["machines"] + [{**saved["machines"][0], "cpu": "another"}]
    where = {**dict.fromkeys(saved["rows"], 0), row: 1}
    del where[next(key for key in saved["rows"] if key.startswith("stock"))]
    data.write_text(json.dumps({**saved, "machines": elsewhere, "measured_on": where}))
    script.run()
    page = script.output.with_suffix(".md").read_text()
    assert "Machine 2: " in page and "another" in page.partition("Machine 2: ")[2].partition("\n")[0]
    assert [cells[-1] for cells in script.table(1)] == ["?, 1", "1", "1", "1, 2", "1"]
    for other in (row.replace("1 of 2", "1 of 5"), row.replace("recall [", "recall [0")):
        data.write_text(json.dumps({**saved, "rows": {**saved["rows"], other: saved["rows"][row]}}))
        with pytest.raises(SystemExit, match="several plans"):
            script.run()


@pytest.mark.usefixtures("scripts")
def test_a_needle_is_looked_for_and_reading_is_noted_on_the_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--tokens", "1300", "--window", "400"]
    script = Script("needle", monkeypatch, tmp_path / "needle.json", *options)
    monkeypatch.setattr(script.module, "PIECE", 100)
    monkeypatch.setattr(script.module, "MARKS", (100, 300, 50_000))
    script.run()
    assert measured(capsys) == ["1300 tokens, depth 0.1, tier disk"]
    (row,) = script.saved["rows"].values()
    early, first, last = row["notes"]
    assert early["tokens"] == 100 and "told" not in early, "what was hidden was not read yet"
    assert (first["tokens"], first["is_found"], last["is_found"]) == (300, False, False)
    assert 1200 < last["tokens"] < 1300, "asking a copy does not lengthen what is read"
    assert first["disk"] == 0 < last["disk"] and first["window"] <= last["window"]
    found = ["-", "no", "no"]
    assert [(line[0], line[8]) for line in script.table(0)] == [
        *zip(["100", "300", f"{last['tokens']:,}"], found, strict=True)
    ]
    assert script.table(0)[0][3] == "1.00"
    monkeypatch.setattr(script.module, "look_for_one", None)
    script.run()
    assert measured(capsys) == []


@pytest.mark.usefixtures("scripts")
def test_reading_rates_are_told_at_each_length_beside_the_first_method(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--window", "300", "--lengths", "700", "400"]
    ways = ["lm-infinite", "recall"]
    script = Script("reading_rate", monkeypatch, tmp_path / "rate.json", *options, "--ways", *ways)
    monkeypatch.setattr(script.module, "PIECE", 100)
    script.run()
    assert measured(capsys) == ways
    rows = script.saved["rows"]
    assert all(len(rows[way]["rates"]) == 2 and min(rows[way]["rates"]) > 0 for way in ways)
    assert rows["lm-infinite"]["bytes"]["ram"] == 0 < rows["recall"]["bytes"]["ram"]
    lines = script.table(0)
    assert [line[0] for line in lines] == ways and all("(100%)" in cell for cell in lines[0][1:3])
    assert [line[3] for line in lines] == [f"{rows[way]['single_ms']:.0f}" for way in ways]
    share = rows["recall"]["rates"][1] / rows["lm-infinite"]["rates"][1]
    assert f"({share:.0%})" in lines[1][2]
    monkeypatch.setattr(script.module, "read", None)
    script.run()
    assert measured(capsys) == []


# --- packed weights -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("scripts")
def test_weights_compares_packed_with_float_ones(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        str(folder / "novel.txt"),
        "--model",
        str(folder / "tiny"),
        "--tokens",
        "400",
        "--window",
        "40",
    ]
    weights = Script("weights", monkeypatch, tmp_path / "weights.json", *options)
    weights.run()
    assert measured(capsys) == ["float", "int8", "int4"]
    blocks = {kind: row["blocks"] for kind, row in weights.rows.items()}
    assert {len(each) for each in blocks.values()} == {399 // 32}
    assert blocks["float"] != blocks["int8"] != blocks["int4"]
    float_row, *packed = weights.table(0)
    mean = sum(blocks["float"]) / len(blocks["float"])
    assert float_row[:2] == ["float", f"{math.exp(mean):.3f}"]
    for kind, row in zip(("int8", "int4"), packed, strict=True):
        change = math.expm1(sum(blocks[kind]) / len(blocks[kind]) - mean)
        assert row[0] == kind and row[2] == f"{change:+.2%}"
    monkeypatch.setattr(weights.module, "Driver", None)
    weights.run()
    assert measured(capsys) == []


@pytest.mark.usefixtures("scripts")
def test_writing_measures_each_way_in_a_process_of_its_own(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--window", "40", "--repeats", "1"]
    writing = Script("writing", monkeypatch, tmp_path / "writing.json", *options)
    monkeypatch.setattr(writing.module, "WAITING", {"sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"}})
    monkeypatch.setattr(writing.module, "WEIGHTS", ("stock", "int4"))
    writing.run()
    assert measured(capsys) == ["stock, sleep at once", "int4, sleep at once"]
    assert writing.table(0) == [
        [kind, f"{writing.rows[f'{kind}, sleep at once']:.1f}"] for kind in ("stock", "int4")
    ]


@pytest.mark.usefixtures("scripts")
def test_default_writing_measures_each_way_at_each_length(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--depths", "20"]
    script = Script("default_writing", monkeypatch, tmp_path / "default_writing.json", *options)
    monkeypatch.setenv("EVERLONG_KERNELS", "1")
    script.run()
    ways = script.module.WAYS
    assert measured(capsys) == [f"20 tokens, {way}" for way in ways.values()]
    found = {name: script.rows[f"20 tokens, {way}"] for name, way in ways.items()}
    assert min(row["ms"] for row in found.values()) > 0
    assert found["stock"]["as"] == ["NoneType", "float"] and found["1"]["as"][0] == "Recall"
    times = found["stock"]["ms"] / found["1"]["ms"]
    assert script.table(0) == [["20", *(f"{found[way]['ms']:.1f}" for way in ways), f"{times:.1f}x"]]


# --- start-up -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("scripts")
def test_start_up_measures_fresh_processes_to_the_end_and_in_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--repeats", "1"]
    script = Script("start_up", monkeypatch, tmp_path / "start_up.json", *options)
    monkeypatch.setattr(script.module, "WEIGHTS", ("int8",))
    script.run()
    stock = "the same model by transformers alone"
    below = ["import torch", "transformers' class of models, imported", stock]
    ours = ["import everlong", "everlong --help", "load, int8", "everlong generate, to its first token"]
    whole = [*below, *ours]
    assert measured(capsys) == [*whole, "parts, int8"]
    assert script.table(0) == [[name, f"{script.rows[name][0]:.2f}"] for name in whole]
    (parts,) = script.rows["parts, int8"]
    first, again = parts["first token"], parts["token of another session"]
    shown = [*(parts[part] for part in script.module.PARTS[:5]), first - again]
    assert min(parts.values()) > 0 and list(parts) == list(script.module.PARTS)
    assert script.table(1) == [["int8", *(f"{seconds:.2f}" for seconds in shown)]]
    monkeypatch.setattr(subprocess, "run", None)
    script.run()
    assert measured(capsys) == []


@linux
@pytest.mark.usefixtures("scripts")
def test_what_waiting_for_the_tier_takes_is_a_share(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(folder / "tiny"), "--window", "64", "--tokens", "7000"]
    script = Script("prefetch", monkeypatch, tmp_path / "prefetch.json", *options)
    script.run()
    assert measured(capsys) == list(script.module.TIERS)
    for name, row in script.rows.items():
        assert all(0 < waited < whole for whole, waited in (row["piece"], row["token"]))
        assert bool(row["tier"]["disk"]) == (name != "RAM")
    assert all(cells[3].endswith("%") and cells[6].endswith("%") for cells in script.table(0))


@linux
@pytest.mark.usefixtures("scripts")
def test_what_choices_cost_is_read_from_one_text(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    novel = tmp_path / "novel.txt"
    novel.write_text("It is a truth universally acknowledged, that a model must be in want of a text. " * 30)
    options = [str(novel), "--model", str(folder / "tiny"), "--window", "400", "--tokens", "1200"]
    script = Script("choices", monkeypatch, tmp_path / "choices.json", *options)
    script.run()
    assert measured(capsys) == ["stock", "lm-infinite", *script.module.CHANGES]
    first = [cells[1] for cells in script.table(0)]
    assert len(set(first)) == 1  # up to the window they are the same
    assert script.rows["recall"] != script.rows["recall, distance=64"] != script.rows["lm-infinite"]
    assert script.rows["recall, distance=L-1"] == script.rows["recall"]  # where L is small
