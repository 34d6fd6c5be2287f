"""benchmarks/memory_passing.py, as small as it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.test_benchmarks
from everlong.memory import segments
from everlong.memory.recipes import make_recipe
from tests.test_benchmarks import Script, measured

folder, scripts = tests.test_benchmarks.folder, tests.test_benchmarks.scripts
OPTIONS = ("--documents", "1", "--window", "64", "--tokens", "200", "--learned", "100", "--force")
OPTIONS += ("--segment-tokens", "32")


@pytest.mark.usefixtures("scripts")
def test_the_stream_is_read_in_each_way_once_and_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script("memory_passing", monkeypatch, tmp_path / "a.json", "--model", str(folder / "tiny"))
    documents = script.module.fact_documents
    monkeypatch.setattr(script.module, "fact_documents", lambda seed, count: documents(seed, count, 2, 2))
    monkeypatch.setattr(segments, "_SHATTERED", 10.0)
    fast = {
        **{"generators": ("text",), "selection": "all", "passes": 1, "rank": 8},
        **{"anchors": 0, "continuations": 0, "readings": 0},
    }
    monkeypatch.setattr(script.module, "make_recipe", lambda **changes: make_recipe(**{**fast, **changes}))
    script.run(*OPTIONS)
    expected = ["no context", "window alone", "all in the window", "window + memory"]
    assert measured(capsys) == expected == list(script.rows)
    script.run(*OPTIONS)
    assert not measured(capsys)

    rows = script.rows
    text = documents(0, 1, 2, 2)[0].text
    learning = rows["window + memory"]["learning"]
    assert learning["segments"] >= 1 and learning["tokens"] <= len(text) + 2 + 100 - (64 - 10)
    assert rows["window alone"]["kept"] == rows["window + memory"]["kept"] == 64
    assert rows["window alone"]["read"] == rows["all in the window"]["read"]
    assert 0 <= rows["all in the window"]["read"] - rows["all in the window"]["kept"] < 64  # not run yet
    assert len(script.table(0)) == 5 and script.table(0)[1][0] == "the window of 64 tokens"
    assert all("(" in cell and "to" in cell for row in script.table(0) for cell in row[1:4])
