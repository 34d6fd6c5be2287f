"""What a report measures beside what is found: each number is that of the slow way, each row is kept."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import everlong
from everlong.errors import ConfigurationError, InputError, UnknownNameError
from everlong.evaluation import (
    invented_facts,
    line_pictures,
    long_inputs,
    memory_measure,
    resources,
    speed_measure,
)
from everlong.evaluation.asking import answers
from everlong.evaluation.comparison import MethodResult
from everlong.evaluation.facts import fact_documents
from everlong.evaluation.finding_report import FindingReport, page
from everlong.evaluation.invented_facts import InventedFacts
from everlong.evaluation.kept import KeptRows
from everlong.evaluation.line_pictures import Line, Panel, draw_lines
from everlong.evaluation.long_inputs import Way, make_ways
from everlong.evaluation.loss import surprisal
from everlong.evaluation.measures import Measure, Section, left, taken
from everlong.evaluation.memory_measure import most_tokens
from everlong.evaluation.needles import passkey
from everlong.evaluation.page_parts import section_tables
from everlong.evaluation.pair_probes import pair_probes
from everlong.evaluation.perplexity import read_on
from everlong.evaluation.perplexity_measure import PerplexityByPosition
from everlong.evaluation.probes import Probe
from everlong.evaluation.resources import describe_machine
from everlong.evaluation.speed_measure import SpeedByLength
from everlong.evaluation.stored_memories import StoredMemories
from everlong.evaluation.streams import PolicyStream, open_stream
from everlong.evaluation.texts import haystack
from everlong.memory.pairs import Pair
from everlong.memory.record import Source
from everlong.memory.store import MemoryStore
from everlong.models.head import Head
from everlong.models.loading import LoadedModel
from tests import tiny
from tests.evaluation.expected import Clock, perplexity_of, stock_logits, surprisal_of
from tests.evaluation.test_finding_report import Reader
from tests.memory.adapters import adapter_of, record

TEXT = "Orla Finch keeps seven bees in Sligo. Bennet paints wooden boats beside the harbour. " * 30
QUICK = {"generators": ("text",), "selection": "all", "passes": 1, "anchors": 0, "ewc": 0, "readings": 0}
SMALL = {"window": 60, "sinks": 4, "recalled": 32, "block": 16}


@pytest.fixture
def loaded() -> LoadedModel:
    model, tokenizer = tiny.byte_llama(max_position_embeddings=512)
    return LoadedModel(model, tokenizer, "tiny", "given")


@pytest.fixture
def novel(tmp_path: Path) -> str:
    path = tmp_path / "novel.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer of bytes is good enough for long texts."""
    monkeypatch.setattr("everlong.memory.segments._SHATTERED", 2.0)


def ways(*names: str, **options: Any) -> list[Way]:
    return make_ways(names, options)


def rows_of(measure: Measure, loaded: LoadedModel, *some: Way, kept: KeptRows | None = None) -> list[Any]:
    """Take all steps; what they give is what JSON makes of it."""
    rows = list(taken(measure.steps(loaded, some), kept, lambda done, note: None))
    return [json.loads(json.dumps(row, allow_nan=False)) for row in rows]


def said(section: Section) -> tuple[str, str]:
    """Return what the page and what the terminal say."""
    report = FindingReport("tiny", (), (describe_machine(),), {}, {}, (section,))
    reader, target = Reader(page(report)), io.StringIO()
    assert not reader.open and json.dumps(report.as_json(), allow_nan=False)
    Console(file=target, width=100).print(section_tables(section))
    return reader.said, target.getvalue()


# --- perplexity ---------------------------------------------------------------------------------------


def test_perplexity_by_position_is_that_of_the_slow_way(loaded: LoadedModel, novel: str) -> None:
    measure = PerplexityByPosition(100, novel, width=40, chunk=32)
    some = ways("stock", "last", "lm-infinite", window=30, sinks=4)
    rows = rows_of(measure, loaded, *some)
    ids = haystack(loaded.tokenizer, novel, 100).ids
    slow = surprisal_of(stock_logits(loaded.model, ids), ids)
    found = [MethodResult.restored(row["result"]) for row in rows]
    assert [result.name for result in found] == ["stock", "lm-infinite"]  # what is cut has no positions
    for bucket, begin in zip(found[0].buckets, (0, 40, 80), strict=True):
        expected = perplexity_of(slow[begin : begin + 40].tolist())
        assert bucket.perplexity == pytest.approx(expected, rel=1e-4)
    table = next(t for t in measure.section(rows).tables if t.caption == "in times of stock's")
    ratio = found[1].buckets[2].perplexity / found[0].buckets[2].perplexity
    assert table.rows == (("lm-infinite", *table.rows[0][1:3], f"{ratio:,.3f}"),)
    assert "times of stock" not in said(measure.section(rows[1:]))[0]  # where stock was left out
    assert found[1].buckets[0] != found[0].buckets[0] and found[1].forgotten == 70


def test_the_section_shows_positions_costs_and_who_looks_ahead(loaded: LoadedModel, novel: str) -> None:
    measure = PerplexityByPosition(600, novel, chunk=64)
    rows = rows_of(measure, loaded, *ways("stock", "inf-llm", "snap-kv", **SMALL))
    whole, terminal = said(measure.section(rows))
    for word in (
        "75-150",
        "inf-llm*",
        "novel.txt",
        "512 tokens",
        "query-aware",
        "held: ram",
        "seconds",
        "yes",
    ):
        assert word in whole, word
    assert "* a little too good" in terminal and "inf-llm*" in terminal and "held" not in terminal
    assert len(measure.section(rows).tables[0].rows[0]) == 9


def test_what_is_infinite_is_kept_and_shown(loaded: LoadedModel, novel: str) -> None:
    measure = PerplexityByPosition(64, novel)
    (row,) = rows_of(measure, loaded, *ways("stock"))
    row["result"]["buckets"][1] |= {"perplexity": None, "high": None}
    result = MethodResult.restored(row["result"])
    assert result.buckets[1].perplexity == math.inf and math.isnan(result.decode_ms)
    assert "∞" in said(measure.section([row]))[1]
    assert MethodResult.restored(result.as_json()).buckets == result.buckets


# --- speed --------------------------------------------------------------------------------------------


def test_speed_is_measured_at_each_length_of_methods_that_read_the_whole(
    loaded: LoadedModel, novel: str
) -> None:
    measure = SpeedByLength((300, 150), novel, chunk=64, written=3)
    some = ways("stock", "first-and-last", "sir-llm", "inf-llm", "snap-kv", **SMALL)
    rows = rows_of(measure, loaded, *some)
    names = ["stock", "sir-llm", "inf-llm", "snap-kv"]
    assert [(row["way"], row["length"]) for row in rows] == [(n, 150) for n in names] + [
        (n, 300) for n in names
    ]
    for row in rows:
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["length"])
        assert row["decode_ms"] > 0 and row["last_tokens_per_second"] > 0
    assert [row["seen"] for row in rows[4:]] == [300, 60, 60, 300]
    assert [row["is_query_aware"] for row in rows[4:]] == [False, False, False, True]
    whole, terminal = said(measure.section(rows))
    assert len(measure.section(rows).pictures) == 1 and not measure.section(rows[:4]).pictures
    for word in ("speed, 150 tokens", "speed, 300 tokens", "held: ram", "query-aware", novel, "ms/token"):
        assert word in whole, word
    assert terminal.count("inf-llm") == 2


def test_bytes_are_those_of_the_stream_that_read(loaded: LoadedModel, novel: str) -> None:
    (way,) = ways("inf-llm", **SMALL)
    (row,) = rows_of(SpeedByLength((150,), novel, chunk=64, written=3), loaded, way)
    ids = haystack(loaded.tokenizer, novel, 153).ids
    with open_stream(loaded.model, way.policy) as stream:
        for piece in torch.split(ids[:150], 64):
            stream.read(piece)
        assert row["bytes"] == stream.bytes() and row["forgotten"] == stream.forgotten


def test_what_is_forgotten_after_a_text_is_not_what_writing_made_forgotten(
    loaded: LoadedModel, novel: str
) -> None:
    (way,) = ways("lm-infinite", window=60, sinks=4)
    (row,) = rows_of(SpeedByLength((150,), novel, written=30), loaded, way)
    assert row["forgotten"] == 150 - 60


def test_the_seconds_of_reading_hold_what_a_method_spends_on_choosing(
    loaded: LoadedModel, novel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, end = Clock(), PolicyStream.end_reading

    def choose(self: PolicyStream) -> None:
        clock.now += 100
        end(self)

    def read(*given: Any) -> Any:
        clock.now += 1
        return read_on(*given)

    monkeypatch.setattr(PolicyStream, "end_reading", choose)
    for module in (speed_measure, long_inputs):
        monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(module, "read_on", read)
    (way,) = ways("snap-kv", budget=40)
    (row,) = rows_of(SpeedByLength((128,), novel, chunk=64, written=2), loaded, way)
    assert row["seconds"] == 102 and row["last_tokens_per_second"] == 64
    sample = passkey(loaded.tokenizer, 900, depth=0.5)
    chunks = -(-len(sample.context) // 512) + 1
    assert long_inputs.answer(loaded, way, sample, max_new_tokens=2).seconds == 100 + chunks


def test_a_written_token_goes_through_the_head_once_and_is_told_its_surprisal(
    loaded: LoadedModel, novel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (way,) = ways("sir-llm", window=60, sinks=4)
    told, rows = list[list[float]](), list[int]()
    tell, block = PolicyStream.told, Head.block

    def telling(self: PolicyStream, ids: torch.Tensor, surprisal: torch.Tensor) -> None:
        told.append(surprisal.tolist())
        tell(self, ids, surprisal)

    def counting(self: Head, hidden: torch.Tensor, begin: int, stop: int) -> torch.Tensor:
        rows.append(len(hidden))
        return block(self, hidden, begin, stop)

    monkeypatch.setattr(PolicyStream, "told", telling)
    monkeypatch.setattr(Head, "block", counting)
    rows_of(SpeedByLength((100,), novel, chunk=100, written=5), loaded, way)
    assert rows.count(1) == 1 + 5  # of the text's last token, and of each that was written
    ids, head = haystack(loaded.tokenizer, novel, 105).ids, Head(loaded.model)
    with open_stream(loaded.model, way.policy) as stream, torch.inference_mode():
        hidden = read_on(stream, head, ids[:100], None)
        for at in range(100, 105):
            hidden = read_on(stream, head, ids[at : at + 1], hidden)
    ours, slow = told[-11:-6], told[-5:]
    assert [one[0] for one in ours] == pytest.approx([one[0] for one in slow], abs=1e-4)


def test_lookups_count_where_writing_is_timed(
    loaded: LoadedModel, novel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(stream: Any, ids: Any, head: Any) -> list[float]:
        return [100.0, *([0.001, 0.001, 0.001, 0.005] * 16)][: len(ids)]

    monkeypatch.setattr(speed_measure, "decode_seconds", seconds)
    measure = SpeedByLength((64,), novel)
    (row,) = rows_of(measure, loaded, *ways("stock"))
    assert row["decode_ms"] == pytest.approx(2)
    assert "writes 65 tokens: means of these less the first" in measure.section([row]).note


# --- memory -------------------------------------------------------------------------------------------


PAIRS = [
    Pair("Who keeps bees?", " Orla Finch", "questions"),
    Pair("Orla", " Finch keeps seven wooden beehives in Sligo.", "cloze"),
    Pair("Where? Orla", " Finch keeps seven wooden beehives in Sligo.", "cloze"),
    Pair("What is it that she says of them?", " a very long answer of more than six words", "questions"),
    Pair("Is it so?", " ...", "questions"),
]


@pytest.fixture
def store(tmp_path: Path, loaded: LoadedModel) -> MemoryStore:
    made = MemoryStore(tmp_path / "memories")
    for number, name in enumerate(("bees", "boats")):
        own = record(name, base_hash=loaded.weights_hash, source=Source.of(name, 5))
        made.add(own, adapter_of(tiny.byte_llama()[0], number), PAIRS)
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


# --- rows and refusals --------------------------------------------------------------------------------


def test_rows_are_kept_and_only_what_changed_is_measured_again(
    loaded: LoadedModel, novel: str, tmp_path: Path
) -> None:
    kept = KeptRows(tmp_path / "rows.json", {})
    some = ways("stock", "lm-infinite", window=30, sinks=4)
    speed, perplexity = SpeedByLength((64,), novel), PerplexityByPosition(64, novel)
    for measure in (speed, perplexity):
        rows_of(measure, loaded, *some, kept=kept)
    again = KeptRows(tmp_path / "rows.json", {})
    assert not left([*speed.steps(loaded, some), *perplexity.steps(loaded, some)], again)
    longer = left(SpeedByLength((64, 128), novel).steps(loaded, some), again)
    assert [step.label for step in longer] == [
        "stock: speed at 128 tokens",
        "lm-infinite: speed at 128 tokens",
    ]
    (narrower,) = left(perplexity.steps(loaded, ways("stock", "lm-infinite", window=31, sinks=4)), again)
    assert narrower.label.startswith("lm-infinite")
    Path(novel).write_text(f"x{TEXT}")
    assert len(left(perplexity.steps(loaded, some), again)) == 2


def test_speed_is_measured_again_on_another_machine_and_kept_to_another_day(
    loaded: LoadedModel, novel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, measure = KeptRows(tmp_path / "rows.json", {}), SpeedByLength((64,), novel, written=3)
    rows_of(measure, loaded, *ways("stock"), kept=kept)
    machine = describe_machine()
    for other, again in (({"date": "2031-01-01"}, 0), ({"threads": 77}, 1)):
        monkeypatch.setattr(resources, "describe_machine", lambda other=other: machine | other)
        assert len(left(measure.steps(loaded, ways("stock")), kept)) == again


@pytest.mark.parametrize("measure", [PerplexityByPosition, lambda n, text: SpeedByLength((n,), text)])
def test_a_text_that_is_too_short_and_ways_that_cut_it_are_refused(
    loaded: LoadedModel, novel: str, measure: Any
) -> None:
    with pytest.raises(InputError, match=r"novel.txt has 2,\d+ tokens, fewer than the .* a longer --text"):
        measure(4000, novel).steps(loaded, ways("stock"))
    with pytest.raises(ConfigurationError, match="read a text whole.*last; name one with --methods"):
        measure(64, novel).steps(loaded, ways("last", window=30))
    with pytest.raises(InputError, match="missing.txt"):
        measure(64, "missing.txt").steps(loaded, ways("stock"))


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


def test_lines_are_drawn_for_many_ways_on_pages_of_either_brightness() -> None:
    lines = tuple(Line(f"<way {n}>", (1.0, 2.0), (n + 1.0, 5.0)) for n in range(17))
    panels = [
        Panel("one", "tokens", lines, is_log=True, mark=1.5, mark_name="here"),
        Panel("two", "x", lines[:1]),
    ]
    light, dark = (draw_lines(panels, dark=kind) for kind in (False, True))
    assert light.startswith(b"\x89PNG") and light != dark


def test_the_legend_names_each_line_once_as_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    original = line_pictures.as_png
    monkeypatch.setattr(line_pictures, "as_png", lambda figure: drawn.append(figure) or original(figure))
    names = ["_mine", "costs $5 or $", "plain"]
    lines = tuple(Line(name, (1.0, 2.0), (3.0, 5.0)) for name in names)
    draw_lines([Panel("one", "x", lines[:2]), Panel("two", "x", lines)], dark=False)
    (legend,) = drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == names
    one, two = drawn[0].axes
    colours = [handle.get_color() for handle in legend.get_lines()]
    assert len(set(colours)) == 3 and [line.get_color() for line in one.lines] == colours[:2]
    assert [line.get_color() for line in two.lines] == colours
