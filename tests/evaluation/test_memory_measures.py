"""What a report measures of memories: asked as PEFT loads them, beside the text, and kept as rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import everlong
from everlong.errors import ConfigurationError, InputError, MemoryStoreError, UnknownNameError
from everlong.evaluation import (
    invented_facts,
    memory_measure,
    stored_memories,
)
from everlong.evaluation.asking import answers
from everlong.evaluation.facts import fact_documents
from everlong.evaluation.finding_report import FindingReport, page
from everlong.evaluation.invented_facts import InventedFacts
from everlong.evaluation.kept import KeptRows
from everlong.evaluation.loss import surprisal
from everlong.evaluation.measures import left, taken
from everlong.evaluation.memory_measure import most_tokens
from everlong.evaluation.pair_probes import pair_probes
from everlong.evaluation.perplexity_measure import PerplexityByPosition
from everlong.evaluation.probes import Probe
from everlong.evaluation.resources import describe_machine
from everlong.evaluation.speed_measure import SpeedByLength
from everlong.evaluation.stored_memories import StoredMemories
from everlong.memory.pairs import Pair
from everlong.memory.record import Source
from everlong.memory.store import MemoryStore
from everlong.models.loading import LoadedModel
from tests import tiny
from tests.evaluation.expected import stock_logits, surprisal_of
from tests.evaluation.measuring import QUICK, TEXT, rows_of, said
from tests.memory.adapters import adapter_of, record

PAIRS = [
    Pair("Who keeps bees?", " Orla Finch", "questions"),
    Pair("Orla", " Finch keeps seven wooden beehives in Sligo.", "cloze"),
    Pair("Where? Orla", " Finch keeps seven wooden beehives in Sligo.", "cloze"),
    Pair("What is it that she says of them?", " a very long answer of more than six words", "questions"),
    Pair("Is it so?", " ...", "questions"),
]


BOATS = [Pair("Who sails?", " Tom Reed", "questions"), PAIRS[-1]]


@pytest.fixture
def store(tmp_path: Path, loaded: LoadedModel) -> MemoryStore:
    made = MemoryStore(tmp_path / "memories")
    for number, (name, pairs) in enumerate({"bees": PAIRS, "boats": BOATS}.items()):
        own = record(name, base_hash=loaded.weights_hash, source=Source.of(name, 5))
        made.add(own, adapter_of(tiny.byte_llama()[0], number), pairs)
    made.add(record("alien", base_hash="1" * 64), adapter_of(tiny.byte_llama()[0], 3), PAIRS)
    return made


def test_pairs_become_questions_with_short_answers_and_sentences_with_a_word_left_out() -> None:
    probes = pair_probes(PAIRS)
    assert [probe.form for probe in probes] == ["question", "cloze"]
    assert probes[0].prompt == "Question: Who keeps bees?\nAnswer:" and probes[0].answers == ("Orla Finch",)
    assert probes[1].answers[0] in ("wooden", "beehives") and "Where?" not in probes[1].prompt
    assert pair_probes(PAIRS, seed=0) == probes and not pair_probes([Pair("", "No.", "text")])


def test_what_is_asked_goes_by_what_made_a_pair() -> None:
    def sentence(number: int, *, before: str = "", segment: int = 0) -> Pair:
        word = f"beehives{chr(97 + number % 26)}{chr(97 + number // 26)}"
        return Pair(f"{before}Orla", f" keeps the {word} near her garden", "cloze", segment, (number,))

    heading = Pair("Sligo", " today", "cloze", 0, (99,))  # stands in other sentences too
    told = Pair("Bennet", " saw Sligo today and its long harbour walls", "cloze", 0, (98,))
    probes = pair_probes([heading, told, sentence(0, before="It is so. "), sentence(0), sentence(1)])
    assert [probe.prompt.split()[0] for probe in probes] == ["Bennet", "Orla", "Orla"]
    assert all(probe.prompt.count("Orla") <= 1 for probe in probes)  # without full stops, each by itself

    made = [
        Pair("Who is it?", " Orla", "reasoning"),
        Pair("What does she keep", " bees", "questions"),
        Pair("Bennet", " saw the wooden beehives in Sligo", "reading"),
    ]
    assert [(probe.form, probe.answers) for probe in pair_probes(made)] == [("question", ("bees",))]
    many = [Pair(f"Who is number {n}?", f" Orla {n}", "questions") for n in range(200)]
    some = pair_probes([*many, *(sentence(n) for n in range(200))])
    asked = [int(probe.answers[0].split()[1]) for probe in some[:40]]
    assert len(some) == 80 and asked == sorted(set(asked)) and asked[0] < 40 and asked[-1] > 160


def test_an_answer_may_be_as_long_as_the_longest_that_is_right(loaded: LoadedModel) -> None:
    long = Probe("Q", ("a" * 40,), "question")
    assert most_tokens(loaded.tokenizer, [Probe("Q", ("yes",), "question")]) == 12
    assert most_tokens(loaded.tokenizer, [long, Probe("Q", ("yes",), "question")]) == 1 + 40 + 2


def test_forgetting_is_not_measured_on_what_was_learned(
    loaded: LoadedModel, novel: str, tmp_path: Path
) -> None:
    made = MemoryStore(tmp_path / "own")
    own = record("novel", base_hash=loaded.weights_hash, source=Source.of(TEXT, 5))
    made.add(own, adapter_of(tiny.byte_llama()[0], 0), PAIRS)
    with pytest.raises(
        ConfigurationError, match=r"novel.txt is what memory 'novel' was learned from.*--text"
    ):
        StoredMemories(text=novel, memories=("novel",), store=made).steps(loaded, ())
    assert StoredMemories(memories=("novel",), store=made).steps(loaded, ())


def test_what_was_merged_with_a_memory_is_not_of_another_document(
    loaded: LoadedModel, store: MemoryStore, novel: str
) -> None:
    def beside() -> list[str]:
        steps = StoredMemories(text=novel, memories=("bees",), store=store).steps(loaded, ())
        return [name for name in ("all", "copy", "boats") if f"beside {name} " in steps[-1].key]

    store.merge(["bees", "boats"], into="all")
    store.add(
        record("copy", base_hash=loaded.weights_hash, source=Source.of("an edition", 5)),
        adapter_of(tiny.byte_llama()[0], 0),
        PAIRS[1:],
    )
    assert [memory.name for memory in store.list()] == ["alien", "all", "bees", "boats", "copy"]
    assert beside() == ["boats"]
    store.delete("boats")
    assert beside() == []


@pytest.mark.parametrize("what", ["as it was", "another one meanwhile", "gone", "read-only"])
def test_what_a_memory_recalls_is_written_into_its_record(
    loaded: LoadedModel, store: MemoryStore, novel: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.get("bees").record

    def asked(*_: Any) -> list[dict[str, Any]]:
        if what == "another one meanwhile":
            store.update(replace(before, seconds=77.0))
        elif what == "gone" and "bees" in [memory.name for memory in store.list()]:
            store.rename("bees", "wasps")
        told = (("question", " Orla."), ("cloze", " Orla Finch"), ("question", " Tom"))
        return [{"form": form, "prompt": "?", "answers": ["Orla"], "written": text} for form, text in told]

    monkeypatch.setattr(stored_memories, "asked", asked)
    *_, with_it = StoredMemories(text=novel, tokens=200, memories=("bees",), store=store).steps(loaded, ())
    if what == "read-only":
        monkeypatch.setattr(MemoryStore, "update", Mock(side_effect=MemoryStoreError("read-only")))
    with_it.run(lambda *_: None)
    found = store.get("wasps" if what == "gone" else "bees").record.recall
    assert found == ({"question": 0.5, "cloze": 1.0} if what == "as it was" else before.recall)


def test_a_memory_is_asked_again_where_anything_that_counts_changed(
    loaded: LoadedModel, store: MemoryStore, novel: str, tmp_path: Path
) -> None:
    def keys(**changed: Any) -> list[str]:
        given = {"text": novel, "tokens": 200, "memories": ("bees",), "store": store} | changed
        return [step.key for step in StoredMemories(**given).steps(loaded, ())]

    before = keys()
    assert keys() == before
    assert [a == b for a, b in zip(before, keys(tokens=150), strict=True)] == [False, True, False]
    other = tmp_path / "other.txt"
    other.write_text(TEXT[10:])
    assert [a == b for a, b in zip(before, keys(text=str(other)), strict=True)] == [False, True, False]
    store.add(
        record("bees", base_hash=loaded.weights_hash, source=Source.of("bees", 5)),
        adapter_of(tiny.byte_llama()[0], 0),
        PAIRS[:1],
        replace=True,
    )
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, False, False]
    before = keys()
    store.delete("boats")
    assert [a == b for a, b in zip(before, keys(), strict=True)] == [True, True, False]


@pytest.mark.usefixtures("in_bytes")
def test_invented_facts_are_asked_again_where_other_documents_change_what_is_asked(
    loaded: LoadedModel, novel: str
) -> None:
    def keys(documents: int, **settings: Any) -> list[str]:
        measure = InventedFacts(text=novel, tokens=100, documents=documents, settings=QUICK | settings)
        return [step.key for step in measure.steps(loaded, ())]

    one, many = keys(1), keys(2)
    few, more = (fact_documents(0, count)[0] for count in (2, 3))
    assert few.text == more.text and few.probes() != more.probes()  # what several people share is not asked
    assert one[0] == many[0] and one[1] != many[1] and one[2] != many[2]
    assert [a == b for a, b in zip(one, keys(1, passes=2), strict=True)] == [True, True, False]


def test_what_learning_would_refuse_is_refused_before_anything_is_measured(
    loaded: LoadedModel, novel: str
) -> None:
    with pytest.raises(InputError, match="does not know this script"):  # a token of every letter
        InventedFacts(text=novel, tokens=100, people=10, settings=QUICK).steps(loaded, ())


def test_a_text_that_is_too_short_for_a_loss_is_refused(
    loaded: LoadedModel, store: MemoryStore, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Orla keeps bees in wooden boxes.")
    with pytest.raises(InputError, match="has 32 tokens, fewer than 64"):
        StoredMemories(text=str(tmp_path / "short.txt"), memories=("bees",), store=store).steps(loaded, ())


def test_missing_texts_and_memories_are_refused_where_measures_are_made(store: MemoryStore) -> None:
    for make in (
        lambda: PerplexityByPosition(64, "missing.txt"),
        lambda: SpeedByLength((64,), "missing.txt"),
        lambda: InventedFacts(text="missing.txt"),
    ):
        with pytest.raises(InputError, match="missing.txt"):
            make()
    with pytest.raises(UnknownNameError, match="did you mean 'bees'"):
        StoredMemories(memories=("bee",), store=store)


def test_a_memory_is_asked_as_peft_loads_it_and_the_model_is_as_before(
    loaded: LoadedModel, store: MemoryStore, novel: str
) -> None:
    before = stock_logits(loaded.model, torch.arange(3, 90))
    measure = StoredMemories(text=novel, tokens=200, memories=("bees",), store=store)
    first, alone, with_it = rows_of(measure, loaded)
    assert torch.equal(stock_logits(loaded.model, torch.arange(3, 90)), before)
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    (_, sentence) = pair_probes(PAIRS)

    def written(name: str | None) -> list[str]:
        model = tiny.byte_llama(max_position_embeddings=512)[0]
        if name is not None:
            import peft

            model = peft.PeftModel.from_pretrained(model, str(store.path(name)))
        asked = answers(model, loaded.tokenizer, ["Who keeps bees?"], max_new_tokens=13, in_turns=True)
        return asked + answers(model, loaded.tokenizer, [sentence.prompt], max_new_tokens=13)

    recalls = {**alone["recalls"], **with_it["recalls"]}
    assert list(recalls) == ["no memory", "the memory", "a memory of another document (boats)"]
    for found, name in zip(recalls.values(), (None, "bees", "boats"), strict=True):
        assert [each["written"] for each in found] == written(name)
    text = TEXT[:200]
    plain = surprisal(loaded.model, loaded.tokenizer, text)
    assert first["standing"]["surprisal"] == pytest.approx(plain.tolist(), abs=1e-4)
    assert with_it["standing"]["surprisal"] != first["standing"]["surprisal"]

    section = measure.section([first, alone, with_it])
    report = FindingReport("tiny", (), (describe_machine(),), {}, {}, (section,))
    alone_page = page(report)
    assert "<h1>Long-term memory: tiny</h1>" in alone_page and "methods that have them" not in alone_page
    (lost,) = section.values["forgetting"]
    change = torch.tensor(with_it["standing"]["surprisal"]) - plain
    assert lost["loss_change"][0] == pytest.approx(float(change.mean()), abs=1e-3)
    whole, terminal = said(section)
    for word in ("recall of what bees was learned from", "the memory", "(boats)", "forgetting, on novel.txt"):
        assert word in whole and word in terminal, word
    assert "Every answer" in whole and "Who keeps bees?" in whole and "lora, rank 8" in whole


def test_recall_counts_answers_and_is_paired(store: MemoryStore) -> None:
    def answered(*texts: str) -> list[dict[str, Any]]:
        return [
            {"form": "question", "prompt": f"{i}?", "answers": ["yes"], "written": text}
            for i, text in enumerate(texts)
        ]

    rows = [
        {"standing": {"text": "it", "surprisal": [1.0], "task": []}},
        {"about": "it", "recalls": {"no memory": answered("no: yes", "yes")}},
        {"about": "it", "recalls": {"the memory": answered("yes", "yes")}},
    ]
    section = StoredMemories(memories=("bees",), store=store).section(rows)
    values = section.values["recall"]["it"]
    assert values["no memory"]["all"]["right"] == 1 and values["the memory"]["question"]["right"] == 2
    assert section.tables[0].rows[0][3] == "100%"  # has the answer somewhere in it
    assert section.tables[0].rows[1][-1].startswith("+50 (") and section.tables[0].rows[0][-1] == ""


@pytest.mark.usefixtures("in_bytes")
def test_invented_facts_are_learned_and_asked_beside_the_text_and_another_document(
    loaded: LoadedModel, novel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = InventedFacts(text=novel, tokens=100, documents=2, people=1, settings=QUICK)
    kept = KeptRows(tmp_path / "rows.json", {})
    steps = measure.steps(loaded, ())
    told: list[tuple[float, str]] = []
    rows = list(taken(steps[:3], kept, lambda done, note: told.append((done, note))))
    assert [label.split(":")[1] for label in (steps[1].label, steps[2].label)] == [
        " asked without a memory",
        " learned, and asked",
    ]
    assert all(0 <= done <= 1 for done, _ in told) and any("learn" in note for _, note in told)
    assert list(rows[1]["recalls"]) == [
        "no memory",
        "no memory, reading the whole text",
        "no memory, reading the whole text, behind examples",
    ]
    assert list(rows[2]["recalls"]) == ["the memory", "a memory of another document"]
    assert rows[2]["learned"]["pairs"] == 1 and rows[2]["memory"] == "document 1"
    assert not loaded.model.training and not hasattr(loaded.model, "peft_config")

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("learned again")

    monkeypatch.setattr(everlong, "load", again)
    monkeypatch.setattr(memory_measure, "recall", again)
    monkeypatch.setattr(invented_facts, "_check", lambda *given: None)
    assert len(left(measure.steps(loaded, ()), kept)) == 2
    assert list(taken(measure.steps(loaded, ())[:3], kept, again)) == rows
    whole, _ = said(measure.section(rows))
    for word in ("completion", "question", "reverse", "document 1", "seconds to learn", "loss before"):
        assert word in whole, word
    assert "invented facts" in whole


def test_a_cartridge_counts_where_a_text_is_scored(loaded: LoadedModel, tmp_path: Path) -> None:
    import peft

    config = peft.CartridgeConfig(
        num_virtual_tokens=5, num_frozen_tokens=1, num_transformer_submodules=1, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(tiny.byte_llama(max_position_embeddings=512)[0], config)
    with torch.no_grad():
        for parameter in adapted.prompt_encoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    text = "Orla keeps the bees. " * 8  # more than a chunk
    found = surprisal(adapted.eval(), loaded.tokenizer, text)
    ids = torch.tensor([list(text.encode())])
    with torch.no_grad():
        slow = surprisal_of(adapted(input_ids=ids).logits[0][-ids.shape[1] :], ids[0])[1:]
    assert torch.allclose(found, slow, atol=1e-3)
    assert not torch.allclose(found, surprisal(loaded.model, loaded.tokenizer, text), atol=0.1)


@pytest.mark.usefixtures("in_bytes")
def test_a_cartridge_is_asked_too_and_leaves_the_model_as_it_was(
    loaded: LoadedModel, novel: str, tmp_path: Path
) -> None:
    store = MemoryStore(tmp_path / "memories")
    before = stock_logits(loaded.model, torch.arange(3, 90))
    settings: dict[str, Any] = {"generators": ("cloze",), "selection": "all", "passes": 1, "prefix": 8}
    with everlong.load(loaded.model, tokenizer=loaded.tokenizer) as llm:
        llm.memorize(
            TEXT[:170], "bees", "cartridge", store=store, force=True, anchors=0, readings=0, **settings
        )
    measure = StoredMemories(text=novel, tokens=100, memories=("bees",), store=store)
    first, alone, with_it = rows_of(measure, loaded)
    assert with_it["learned"]["kind"] == "cartridge" and list(with_it["recalls"]) == ["the memory"]
    assert with_it["standing"]["surprisal"] != first["standing"]["surprisal"]
    assert torch.equal(stock_logits(loaded.model, torch.arange(3, 90)), before)


def test_memories_that_cannot_be_asked_are_refused(
    loaded: LoadedModel, store: MemoryStore, novel: str, tmp_path: Path
) -> None:
    def steps(*names: str, text: str = novel) -> None:
        StoredMemories(text=text, memories=names, store=store).steps(loaded, ())

    with pytest.raises(UnknownNameError, match="did you mean 'bees'"):
        steps("bee")
    with pytest.raises(ConfigurationError, match="'alien' was learned by 'tiny', with other weights .* load"):
        steps("alien")
    store.add(
        record("mute", base_hash=loaded.weights_hash),
        adapter_of(tiny.byte_llama()[0]),
        [Pair("", "x", "text")],
    )
    with pytest.raises(ConfigurationError, match="'mute' keeps no pairs .* learn its text again"):
        steps("mute")
    with pytest.raises(ConfigurationError, match="each memory once"):
        steps("bees", "bees")
    (tmp_path / "short.txt").write_text("Hello.")
    with pytest.raises(InputError, match=r"short.txt has no sentence .* a longer --text"):
        steps("bees", text=str(tmp_path / "short.txt"))
    with pytest.raises(UnknownNameError, match="passes"):
        InventedFacts(settings={"pases": 1})
    with pytest.raises(ConfigurationError, match="each once"):
        SpeedByLength((5, 5))
