"""benchmarks/memory_facts.py, as small as it goes."""

from __future__ import annotations

from pathlib import Path

import pytest

import tests.test_benchmarks
from tests.test_benchmarks import Script, measured

folder, scripts = tests.test_benchmarks.folder, tests.test_benchmarks.scripts
WAYS = {
    "soft labels": {"generators": ("text",), "selection": "all", "passes": 1},
    "raw text": {"generators": ("text",), "selection": "all", "targets": "hard", "passes": 1},
}


@pytest.mark.usefixtures("scripts")
def test_every_document_is_read_and_learned_once_and_shown_with_its_controls(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Script("memory_facts", monkeypatch, tmp_path / "facts.json", "--model", str(folder / "tiny"))
    documents = script.module.fact_documents
    monkeypatch.setattr(script.module, "WAYS", WAYS)
    monkeypatch.setattr(script.module, "fact_documents", lambda seed, count: documents(seed, count, 2, 2))
    script.run("--documents", "2")
    expected = [
        key
        for number in range(2)
        for key in (f"read {number}", *(f"learned {number}, seed 0, {way}" for way in WAYS))
    ]
    assert measured(capsys) == expected == list(script.rows)
    script.run("--documents", "2")
    assert not measured(capsys)

    names = {row[0] for row in script.table(0)}
    assert {"no context", "whole text, matching examples", "soft labels of another document", *WAYS} <= names
    asked = [2 * len(document.facts) for document in documents(0, 20, 2, 2)[:1]]
    right, of = script.rows["read 0"]["no context"]["completion"]
    assert of == asked[0] // 2 and 0 <= right <= of
    assert all("(" in cell and "to" in cell for row in script.table(0) for cell in row[1:4])
    assert [row[0] for row in script.table(1)] == list(WAYS)
    assert script.rows["learned 0, seed 0, soft labels"]["pairs"] == 1


@pytest.mark.usefixtures("scripts")
def test_shares_are_of_all_documents_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = Script("memory_facts", monkeypatch, tmp_path / "facts.json").module
    assert module.share([[1, 2], [3, 8]]).startswith("40 (")
    forms = {"completion": [1, 1], "question": [0, 2], "reverse": [1, 2]}
    assert module.mean([forms]) == "50"
