"""Memories that are keys and values: learned by the same loop, the same in PEFT and in sessions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from everlong import LLM, FullAttention, LMInfinite, StreamingLLM
from everlong.errors import ConfigurationError, StateError, UnsupportedUseError
from everlong.evaluation.asking import answers
from everlong.memory import cartridge
from everlong.memory.consolidation import loss_of
from everlong.memory.infinite_icl import InfiniteICL
from everlong.memory.progress import Progress
from everlong.memory.segments import segments
from everlong.memory.store import MemoryStore
from everlong.models.head import Head
from tests import tiny
from tests.memory.adapters import lora, record
from tests.memory.students import lesson, plain_logits, student_of
from tests.memory.test_infinite_icl import TEXT, recipe_of, same
from tests.reading.conftest import next_logits

FAST = recipe_of(kind="cartridge", prefix=12, passes=2)
FAMILIES = {"llama": 12, "qwen3": 12, "gemma3_text": 6, "gpt_neox": 12}
"""Plain, with normalised keys, with local layers, with partial rotation and no grouped heads; tokens."""


@pytest.fixture
def llm() -> Iterator[LLM]:
    model, tokenizer = tiny.byte_llama()
    with LLM(model, tokenizer, "tiny", FullAttention()) as made:
        yield made


def with_peft(model: Any, folder: Path, ids: list[int]) -> Tensor:
    """What plain PEFT makes of a memory: logits after the last token."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
        logits: Tensor = adapted(torch.tensor([ids])).logits[0, -1]
    return logits


def test_a_text_is_learned(llm: LLM) -> None:
    model = llm._attached
    learner = InfiniteICL(model, recipe_of(kind="cartridge", prefix=24, passes=30, learning_rate=0.5))
    (tensors,) = learner.learn(TEXT).adapters
    lessons = [lesson("", part.text) for part in segments([TEXT], model.coder, 64)]
    inner = model.attachment.model

    def behind() -> Any:
        return cartridge.past_of(model, tensors[cartridge.WEIGHTS])

    before = loss_of(model, Head(inner), lessons, 1000)
    assert loss_of(model, Head(inner), lessons, 1000, behind) < 0.75 * before
    wrong = [lesson("", "Quartz veins cross a granite bluff, 1887.")]
    assert loss_of(model, Head(inner), wrong, 1000, behind) > 0.85 * loss_of(model, Head(inner), wrong, 1000)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_begins_as_the_first_tokens_themselves(family: str) -> None:
    with student_of(family) as model:
        ids = [256, *TEXT.encode()]
        tokens = FAMILIES[family]
        first = cartridge.first_keys(model, TEXT, tokens)
        assert len(first) == tokens
        past = cartridge.past_of(model, first)
        inner: Any = model.attachment.model
        with torch.no_grad():
            found = inner(torch.tensor([ids[tokens:]]), **{model.attachment.cache_argument: past}).logits[0]
        assert torch.allclose(found, plain_logits(model, ids)[tokens:], atol=1e-4)
        assert len(cartridge.first_keys(model, "Bee.", tokens)) == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_sessions_give_what_peft_makes_of_it(family: str, store: MemoryStore) -> None:
    model, tokenizer = tiny.build(family, vocab_size=tiny.BYTE_VOCAB), tiny.byte_tokenizer()
    with LLM(model, tokenizer, "tiny", LMInfinite(window=200, sinks=4)) as llm:
        memory = llm.memorize(TEXT, "bees", FAST, prefix=FAMILIES[family], store=store)
        session = llm.session(memories=["bees"], store=store)
        session.read("Who keeps bees?")
        ours, without = next_logits(session), llm.session()
        without.read("Who keeps bees?")
        ids = [*session._tape.driver.recent, *session._tape.text.fork().finish()]
        assert not torch.allclose(ours, next_logits(without), atol=1e-2)
        assert session.stats.kept == FAMILIES[family] + len(session._tape.driver.recent)
    assert (memory.record.kind, memory.record.rank) == ("cartridge", None)
    assert torch.allclose(ours, with_peft(model, memory.path, ids), atol=1e-4)


def test_it_stays_when_the_window_moves_on(llm: LLM, store: MemoryStore) -> None:
    llm.memorize(TEXT, "bees", FAST, store=store)
    session = llm.session(LMInfinite(window=40, sinks=4), memories=["bees"], store=store)
    assert session.policy.sinks == 12  # type: ignore[attr-defined]
    held = {
        n: m.sink_keys.clone()
        for n, m in session._tape.driver.cache.memories.items()
        if m.sink_keys is not None
    }
    session.read(TEXT * 3)
    memories = session._tape.driver.cache.memories
    assert held and all(torch.equal(memories[n].sink_keys, keys) for n, keys in held.items())
    assert session.stats.forgotten > 0
    pinned = llm.session(LMInfinite(window=64, sinks=4), memories=["bees"], store=store)
    pinned.pin("Be brief.")
    assert pinned.policy.sinks == 12 + len(pinned._tape.driver.recent)  # type: ignore[attr-defined]


def test_forks_saved_states_and_reset_keep_it(llm: LLM, store: MemoryStore, tmp_path: Path) -> None:
    llm.memorize(TEXT, "bees", FAST, store=store)
    session = llm.session(memories=["bees"], store=store)
    session.read("Who keeps bees?")
    expected = next_logits(session)
    assert torch.equal(next_logits(session.fork()), expected)
    session.save(tmp_path / "a.state")
    restored = llm.restore(tmp_path / "a.state", store=store)
    assert torch.equal(next_logits(restored), expected) and restored.memories == session.memories
    session.reset()
    session.read("Who keeps bees?")
    assert torch.allclose(next_logits(session), expected, atol=1e-6)
    llm.memorize(TEXT, "bees", FAST, seed=1, learning_rate=0.3, store=store, replace=True)
    with pytest.raises(StateError, match="other memories than those now named bees"):
        llm.restore(tmp_path / "a.state", store=store)


@pytest.mark.parametrize("policy", [FullAttention(), LMInfinite(window=40, sinks=2)], ids=["full", "window"])
def test_sessions_write_together_whatever_their_memories(llm: LLM, store: MemoryStore, policy: Any) -> None:
    llm.memorize(TEXT, "bees", FAST, store=store)
    store.add(record("boats", base_hash=llm._attached.weights_hash), lora())

    def sessions() -> list[Any]:
        names: tuple[list[str], ...] = (["bees"], [], ["boats"], ["bees"])
        made = [llm.session(policy, memories=each, store=store) for each in names]
        for number, session in enumerate(made):
            session.read("Orla keeps " * (number + 1))
        return made

    alone = [session.generate(12).text for session in sessions()]
    assert [generation.text for generation in llm.generate_together(sessions(), 12)] == alone


def test_it_goes_on_after_each_segment_and_leaves_nothing_on_the_model() -> None:
    with student_of() as model:
        inner = model.attachment.model
        ids = [256, *TEXT.encode()]
        before, attributes = plain_logits(model, ids), set(inner.__dict__)
        wanted = [parameter.requires_grad for parameter in inner.parameters()]
        stops: list[Progress] = []
        whole = InfiniteICL(model, FAST).learn(TEXT, on_segment=stops.append)
        assert len(stops) > 2 and not same(stops[0], whole)
        assert all(same(InfiniteICL(model, FAST).learn(TEXT, start=stop), whole) for stop in stops)
        assert set(inner.__dict__) == attributes and not any("prompt" in n for n, _ in inner.named_modules())
        assert [parameter.requires_grad for parameter in inner.parameters()] == wanted
        assert torch.equal(plain_logits(model, ids), before)


def test_answers_are_scored_behind_it(llm: LLM, store: MemoryStore) -> None:
    memory = llm.memorize(TEXT, "bees", FAST, store=store)
    asked = ["Who keeps bees?", "Who?"]
    expected = []
    for question in asked:
        session = llm.session(memories=["bees"], store=store)
        session.read(list(question.encode()))
        expected.append(session.generate(6, stop="\n").text.strip())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(tiny.byte_llama()[0], str(memory.path))
    assert answers(adapted, tiny.byte_tokenizer(), asked, max_new_tokens=6) == expected


def test_what_it_cannot_be_used_for_is_refused(llm: LLM, store: MemoryStore) -> None:
    llm.memorize(TEXT, "bees", FAST, store=store)
    store.add(record("boats", base_hash=llm._attached.weights_hash), lora())
    with pytest.raises(ConfigurationError, match="'bees' is a cartridge: it is used alone"):
        llm.session(memories=["boats", "bees"], store=store)
    with pytest.raises(ConfigurationError, match="'bees' is a cartridge: it is used alone"):
        llm.session(memories=["bees"], memory_weights=[0.5], store=store)
    with pytest.raises(ConfigurationError, match="12 tokens.*window"):
        llm.session(LMInfinite(window=12, sinks=2), memories=["bees"], store=store)


def test_models_that_peft_has_no_cartridge_for_are_refused() -> None:
    with student_of("gemma4_text") as model, pytest.raises(UnsupportedUseError, match="infinite-icl"):
        InfiniteICL(model, recipe_of(kind="cartridge", prefix=6)).learn(TEXT)
    with student_of("gemma3_text") as model, pytest.raises(UnsupportedUseError, match="use prefix="):
        InfiniteICL(model, recipe_of(kind="cartridge", prefix=60)).learn(TEXT)


def test_other_policies_with_sinks_keep_it_too(llm: LLM, store: MemoryStore) -> None:
    llm.memorize(TEXT, "bees", FAST, store=store)
    session = llm.session(StreamingLLM(window=40), memories=["bees"], store=store)
    session.read(TEXT)
    assert session.generate(3).tokens == 3
