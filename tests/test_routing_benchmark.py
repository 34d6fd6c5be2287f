"""benchmarks/memory_routing.py, as small as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tests.test_benchmarks
from everlong.llm import LLM
from tests.test_benchmarks import Script, measured

folder, scripts = tests.test_benchmarks.folder, tests.test_benchmarks.scripts


@pytest.mark.usefixtures("scripts")
def test_every_way_is_asked_once_and_what_it_chose_is_shown(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", str(folder / "tiny"), "--store", str(tmp_path / "store"), "--tokens", "40")
    script = Script("memory_routing", monkeypatch, tmp_path / "routing.json", *options)
    module = script.module
    documents, memorize = module.fact_documents, LLM.memorize
    fast: dict[str, Any] = {"generators": ("cloze",), "selection": "all", "passes": 1}
    monkeypatch.setattr(LLM, "memorize", lambda *a, **given: memorize(*a, **fast, **given))
    monkeypatch.setattr(module, "fact_documents", lambda seed, count: documents(seed, count, 2, 2))
    monkeypatch.setattr(module, "GENERAL", {"What is the capital of France?": "Paris"})
    monkeypatch.setattr(module, "EVERYDAY", ("Tell me a joke.",))
    monkeypatch.setattr(module, "TOKENS", 2)
    script.run("--documents", "2", "--probes", "2")
    asked = [f"{what}, {way}" for way in module.WAYS for what in ("asked", "read")]
    assert measured(capsys) == ["learned 0", "learned 1", *asked] == list(script.rows)
    page = script.output.with_suffix(".md").read_text()
    script.run("--documents", "2", "--probes", "2")
    assert not measured(capsys)
    assert script.output.with_suffix(".md").read_text() == page, "of kept rows as of fresh ones"

    by_pairs = [row for row in script.rows[f"asked, {module.BY_PAIRS}"] if row["document"] is not None]
    assert all(row["memories"] == [f"document-{row['document']}"] for row in by_pairs if row["memories"])
    assert {row["document"] for row in by_pairs if row["memories"]} == {0, 1}
    assert all(row["memories"] == [] for row in script.rows["asked, no memory"])
    by_hand = script.rows[f"asked, {module.BY_HAND}"]
    of_one = [row for row in by_hand if row["document"] is not None]
    assert all(row["memories"] == [f"document-{row['document']}"] for row in of_one)
    assert len(script.rows[f"read, {module.BY_HAND}"]) == 2
    assert script.rows["read, auto"] == script.rows["read, no memory"]

    assert [row[0] for row in script.table(0)] == [*module.FORMS, *module.OTHERS]
    assert all(sum(map(int, row[2:5])) in (99, 100, 101) for row in script.table(0))
    assert [row[0] for row in script.table(1)] == list(module.WAYS)
    assert all("(" in cell and "to" in cell for row in script.table(1) for cell in row[1:5])


@pytest.mark.usefixtures("scripts")
def test_probes_are_spread_over_a_document_and_only_known_ones_have_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = Script("memory_routing", monkeypatch, tmp_path / "routing.json").module
    known, strange = module.fact_documents(0, 2)
    asked = module.probes([known], strange, 10)
    assert sum(one.kind == "question" for one in asked) == 10
    completed = [one.prompt for one in asked if one.kind == "completion"]
    assert len({prompt.split()[0] for prompt in completed}) == 10  # people
    people = {fact.person for fact in known.facts}
    assert all((one.document is None) == (one.kind in module.OTHERS) for one in asked)
    assert not [one for one in asked if one.kind == module.OTHERS[0] and any(p in one.prompt for p in people)]
    assert not [one for one in asked if "Question:" in one.prompt or "Answer:" in one.prompt]
    row = {"document": 1, "memories": ["document-1"]}
    assert module.outcome(row) == "right" and module.outcome({**row, "document": None}) == "wrong"
    assert module.outcome({**row, "memories": []}) == "none"
