"""The scripts of `benchmarks/` about memories, as small as they go."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

import tests.test_benchmarks
from everlong.errors import MemoryGateError
from everlong.evaluation.facts import fact_document
from everlong.memory.elicitation import make_generators
from everlong.memory.lessons import Elicited, Teacher
from everlong.memory.pairs import Pair
from everlong.memory.segments import segments
from everlong.memory.writer import Writer
from everlong.models.loading import load_model
from tests.memory.students import student_of
from tests.test_benchmarks import Script, linux, measured

folder, scripts = tests.test_benchmarks.folder, tests.test_benchmarks.scripts
QUICK = {
    **{"generators": ("text",), "selection": "all", "passes": 1},
    **{"anchors": 0, "ewc": 0, "continuations": 0, "readings": 0},
}
pytestmark = pytest.mark.usefixtures("scripts")


@pytest.fixture
def script(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a script that asks the tiny model, with some of its constants changed."""

    def make(name: str, *options: str, **constants: Any) -> Script:
        made = Script(name, monkeypatch, tmp_path / "rows.json", "--model", str(folder / "tiny"), *options)
        for constant, value in constants.items():
            monkeypatch.setattr(made.module, constant, value)
        return made

    return make


@pytest.fixture
def in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of bytes is good enough for long texts."""
    monkeypatch.setattr("everlong.memory.segments._SHATTERED", 2.0)


def names_of(script: Script, number: int = 0) -> list[str]:
    return [row[0] for row in script.table(number)]


# --- facts --------------------------------------------------------------------------------------------


def test_every_document_is_read_and_learned_once_and_shown_with_its_controls(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = {"hard labels": QUICK, "raw text": {**QUICK, "targets": "hard"}}
    facts = script("memory_facts", WAYS=ways, GATED=1)
    documents = facts.module.fact_documents
    monkeypatch.setattr(facts.module, "fact_documents", lambda seed, count: documents(seed, count, 2, 2))
    facts.run("--documents", "2")
    first, second = ([f"learned {number}, seed 0, {way}" for number in range(2)] for way in ways)
    assert measured(capsys) == ["read 0", "gate 0", first[0], "read 1", first[1], *second]
    facts.run("--documents", "2")
    assert not measured(capsys)

    names = {"no context", "whole text, matching examples", "hard labels of another document", *ways}
    assert names <= set(names_of(facts))
    asked = len(documents(0, 20, 2, 2)[0].facts)
    right, of = facts.rows["read 0"]["no context"]["completion"]
    assert of == asked and 0 <= right <= of
    assert all("(" in cell and "to" in cell for row in facts.table(0) for cell in row[2:5])
    assert names_of(facts, 1) == list(ways)
    assert facts.rows["learned 0, seed 0, hard labels"]["pairs"] == 1
    assert "The gate, asked about 1 of them" in facts.output.with_suffix(".md").read_text()


def test_the_gate_tells_what_reading_adds_and_whether_learning_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memories = importlib.import_module("memories")
    loaded, text = load_model(folder / "tiny"), fact_document(0, 2).text
    found = memories.gate(loaded, text)
    assert "cloze" in found["gain"] and all(map(math.isfinite, found["gain"].values()))

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryGateError("it is of no use")

    monkeypatch.setattr(memories.everlong.LLM, "memorize", refuse)
    assert memories.gate(loaded, text)["refused"] == "it is of no use"
    line = memories.gate_line([{"gain": {"cloze": 1.0}, "refused": None}, found | {"refused": "no use"}])
    assert "asked about 2 of them" in line and 'refused 1: "no use"' in line


def test_learning_that_begins_was_not_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memories = importlib.import_module("memories")
    loaded = load_model(folder / "tiny")
    monkeypatch.setattr("everlong.memory.infinite_icl.without_worth", lambda *_: set())
    monkeypatch.setattr("everlong.memory.infinite_icl.consolidate", refuse_to_train)
    assert memories.gate(loaded, fact_document(0, 2).text)["refused"] is None


def refuse_to_train(*_: Any, on_step: Any, **__: Any) -> None:
    from everlong.memory.consolidation import Step

    on_step(Step(1, 2, 0.0, 1))
    pytest.fail("learning went on")


def test_shares_are_of_all_rows_together_and_the_best_with_the_whole_is_100() -> None:
    memories = importlib.import_module("memories")
    assert memories.share([[1, 2], [3, 8]]).startswith("40 (") and memories.share([]) == ""
    rows = [
        {"nothing": {"a": [0, 4]}, "whole": {"a": [1, 4]}, "whole, shown": {"a": [2, 4]}},
        {"ours": {"a": [3, 4]}, "pairs": 3, "seconds": 2.0},
        {"ours": {"b": [0, 1]}, "pairs": 3, "seconds": 2.0},
    ]
    _, _, *lines = memories.recall_table(rows, ["a", "b"], "whole")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells] == ["nothing", "whole", "whole, shown", "ours"]
    assert [row[1] for row in cells] == ["1", "1", "1", "1"], "of a form"
    assert [row[4:] for row in cells] == [["0", "0"], ["25", "50"], ["50", "100"], ["38", "75"]]
    assert cells[0][3] == "" and cells[3][3].startswith("0 (")
    rows.append({"ours": {"a": [1, 4]}})
    assert "| ours | 2 | 50 (" in "\n".join(memories.recall_table(rows, ["a", "b"], "whole"))


# --- skills -------------------------------------------------------------------------------------------


def test_every_skill_is_tried_with_all_controls(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ways = {"a memory": QUICK, "raw text": QUICK}
    skills = script("memory_skills", WAYS=ways, DEMONSTRATIONS=4, TESTS=2, MOST=2)
    kinds = ("labels", "format")
    skills.run("--skills", "1", "--ways", "raw text")
    assert measured(capsys) == [
        key for kind in kinds for key in (f"read {kind} 0", f"learned {kind} 0, seed 0, raw text")
    ]
    skills.run("--skills", "1")
    assert measured(capsys) == [f"learned {kind} 0, seed 0, a memory" for kind in kinds]
    skills.run("--skills", "1")
    assert not measured(capsys)
    assert names_of(skills) == [
        *("nothing", "all demonstrations", "the last 10 %", "raw text"),
        *("a memory", "a memory + the last 10 %", "a memory of another skill"),
    ]
    assert skills.rows["read format 0"]["nothing"]["format"][1] == 2
    assert all("to" in cell for row in skills.table(0) for cell in row[2:4])
    assert names_of(skills, 1) == list(ways)


@pytest.mark.usefixtures("in_bytes")
def test_the_last_demonstrations_are_whole_and_a_memory_is_asked_about_another_skill(
    script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script("memory_skills", WAYS={"a memory": QUICK}).module
    one, other = (module.skill(seed, "labels", 32, 2) for seed in (0, 1))
    assert one.text.strip().endswith(module.last_demonstrations(one))
    assert module.last_demonstrations(one).count("Input:") == 3
    tried = []
    monkeypatch.setattr(module, "score", lambda _, shown, context="": tried.append((shown, context)) or {})
    module.learning(load_model(folder / "tiny"), one, other, 0, "a memory")
    assert tried == [(one, ""), (one, module.last_demonstrations(one)), (other, "")]


# --- grounded -----------------------------------------------------------------------------------------


def test_every_passage_is_scored_before_and_after_with_its_controls(
    script: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = {"a memory": QUICK, "raw text": QUICK}
    grounded = script("memory_grounded", str(folder / "novel.txt"), WAYS=ways, TOKENS=100, MOST=2, WORDS=2)
    grounded.run("--passages", "1")
    learned = [f"learned 0, seed 0, {way}" for way in ways]
    assert measured(capsys) == ["read 0", "read 1", *learned]
    grounded.run("--passages", "1")
    assert not measured(capsys)
    nothing, whole, tail, ours, with_tail, wrong, raw = grounded.table(0)
    assert [row[0] for row in (nothing, whole, tail)] == ["nothing", "the passage", "its last 10 %"]
    assert [row[0] for row in (with_tail, wrong, raw)] == [
        *("a memory + its last 10 %", "a memory of another passage", "raw text"),
    ]
    bare = grounded.rows["read 0"]["nothing"]
    assert nothing[2:] == [f"{math.exp(bare[key]):.1f}" for key in ("passage", "continuation")]
    assert whole[2] == tail[2] == with_tail[2] == "" and ours[2]
    found = grounded.rows[learned[0]]
    change = math.expm1(found["a memory of another passage"]["passage"] - other_nothing(grounded))
    assert wrong[2].endswith(f", {100 * change:+.0f}")


def other_nothing(grounded: Script) -> float:
    nothing: float = grounded.rows["read 1"]["nothing"]["passage"]
    return nothing


def test_a_perplexity_is_compared_with_nothing_on_the_same_passages(script: Any) -> None:
    module = script("memory_grounded").module
    bare = [{"passage": 2.0}, {"passage": 4.0}]
    found = [({"passage": nats["passage"] + math.log(0.5)}, nats) for nats in bare]
    assert module.perplexity(found, "passage") == f"{math.exp(3) / 2:.1f}, -50 (-50 to -50)"
    assert module.perplexity(found[:1], "passage") == f"{math.exp(2) / 2:.1f}, -50"
    assert module.perplexity(found, "continuation") == ""


# --- sequence -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_bytes")
def test_every_segment_so_far_is_asked_about_after_each_turn(
    script: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--unrelated", str(folder / "novel.txt"), "--tokens", "100", "--segments", "3")
    sequence = script("memory_sequence", *options, SETTINGS=QUICK, SEGMENT=150)
    both = ("--ways", "replay", "separate")
    sequence.run(*both)
    assert measured(capsys) == ["replay, seed 0", "separate, seed 0"]
    sequence.run(*both)
    assert not measured(capsys)
    row = sequence.rows["replay, seed 0"]
    of = [[counted[1] for counted in turn] for turn in row["turns"]]
    assert [len(turn) for turn in of] == [1, 2, 3] and of[2][:2] == of[1] and min(of[2]) >= 2
    assert row["loss"][0] != row["loss"][1]
    assert math.isclose(row["loss above"][0], row["loss"][1] - row["loss"][0], abs_tol=1e-4)
    assert names_of(sequence) == ["replay", "separate"]
    assert names_of(sequence, 1) == ["replay, seed 0", "separate, seed 0"]
    assert names_of(sequence, 2) == ["1", "2", "3"] == names_of(sequence, 3)


@pytest.mark.usefixtures("in_bytes")
def test_each_fact_of_the_text_is_asked_of_the_segment_that_tells_it(script: Any, folder: Path) -> None:
    module = script("memory_sequence", SEGMENT=150).module
    parts, asked = module.story(load_model(folder / "tiny"), 0, 4)
    document, read = module.documents(0, 4)
    assert document.text.startswith("".join(part.text + " " for part in parts).strip())
    told = [fact for fact in document.facts if any(fact.before in part.text for part in parts)]
    prompts = [probe.prompt for probes in asked for probe in probes if probe.form == "completion"]
    assert prompts == [fact.before for fact in told] and len(told) > 4
    assert len({fact.person for fact in read.facts}) == 10
    assert not {fact.person for fact in read.facts} & {fact.person for fact in document.facts}


def test_seeds_are_taken_together_in_what_is_remembered(script: Any) -> None:
    module = script("memory_sequence").module
    every = [[[[4, 4]], [[2, 4], [4, 4]]], [[[4, 4]], [[4, 4], [0, 4]]]]
    first, last, of_it, *whole = module.remembered(every)
    assert (first[:3], last[:3], of_it) == ("100", "75 ", "75")
    assert [cell[:3] for cell in whole] == ["75 ", "62 "]
    assert module.triangle(every).rows == ((1.0,), (0.75, 0.5))


# --- cost ---------------------------------------------------------------------------------------------


@linux
def test_both_ways_elicit_and_weigh_the_same_pairs(
    script: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cost = script("memory_cost", "--people", "2")

    def here(path: str, *words: Any) -> Any:
        assert path == cost.module.__file__
        capsys.readouterr()
        cost.run(*map(str, words))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(cost.module, "in_own_process", here)
    cost.run()
    ours, naive = (cost.rows[way] for way in ("ours", "naive"))
    assert ours["gains"].keys() == naive["gains"].keys() and len(ours["gains"]) > 4
    assert all(
        math.isclose(ours["gains"][pair], naive["gains"][pair], abs_tol=1e-3) for pair in ours["gains"]
    )
    assert ours["tokens"] == naive["tokens"] > 0
    assert all(min(seconds, peak) > 0 for way in (ours, naive) for seconds, peak in way["steps"].values())
    assert names_of(cost) == [
        *("elicit", "teach", "select", "consolidate", "all but elicit", "all"),
    ]
    seconds = [1000 * sum(step[0] for step in way["steps"].values()) / way["tokens"] for way in (ours, naive)]
    assert cost.table(0)[-1][1:4] == [*(f"{x:,.1f}" for x in seconds), f"{seconds[1] / seconds[0]:.1f}x"]
    assert f"{len(ours['gains'])} are the same" in cost.output.with_suffix(".md").read_text()


def test_the_naive_loop_writes_teaches_and_learns_the_same() -> None:
    import torch

    from everlong.memory.consolidation import learn_from
    from everlong.models.head import Head

    naive = importlib.import_module("naive")
    text = fact_document(0, 2).text
    with student_of() as model:
        plain: Any = model.attachment.model
        segment = next(segments([text], model.coder, 512))
        elicited = [e for g in make_generators(["cloze"]) for e in g.elicit(segment, Writer(model))]
        asked = Pair("Who keeps bees?", " Orla", "questions")
        elicited.append(Elicited(asked, "Q\n", "Orla. Who? ", is_answer=True, untold="Who? "))
        lessons = Teacher(model, top_k=model.vocabulary).teach(elicited)
        written = Writer(model).write("One two.", ["Three", "Four five"], 12, passages=[" A b.", " C."])
        loss = learn_from(model, Head(plain), lessons[:3])
    assert (
        naive.Writer(plain, model).write("One two.", ["Three", "Four five"], 12, passages=[" A b.", " C."])
        == written
    )
    taught = naive.teach(plain, model, elicited)
    for ours, theirs in zip(lessons, taught, strict=True):
        assert theirs.response == ours.response and math.isclose(
            theirs.pair.gain, ours.pair.gain, abs_tol=1e-4
        )
        logs = theirs.log_probs.log_softmax(-1).gather(1, ours.tokens)
        words = ours.words
        torch.testing.assert_close(logs[:words], ours.log_probs[:words], atol=1e-4, rtol=0)
    assert math.isclose(naive.divergence(plain, taught[:3]).item(), loss, abs_tol=1e-4)
