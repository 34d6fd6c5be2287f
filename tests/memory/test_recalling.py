"""Sessions with memories: what PEFT makes of an adapter, beside sessions without, and without a trace."""

import threading

import peft
import pytest
import torch

from everlong import LLM, FullAttention
from everlong.errors import ConfigurationError, StateError, UnknownNameError, UnsupportedUseError
from everlong.memory.routing import known_memories
from everlong.models.fingerprint import weights_hash
from tests import tiny
from tests.memory.adapters import adapter_of, lora, record
from tests.reading.conftest import next_logits

TEXT = "Orla Finch keeps bees."


@pytest.fixture
def model():
    return tiny.byte_llama()[0]


@pytest.fixture
def stocked(store, model):
    """A store with two memories of the model."""
    made = weights_hash(model)
    for seed, name in enumerate(("bees", "boats")):
        store.add(record(name, base_hash=made, rank=8), adapter_of(model, seed))
    return store


@pytest.fixture
def llm(model):
    with LLM(model, tiny.byte_tokenizer(), "tiny", FullAttention()) as made:
        yield made


def logits_of(llm, store, *names, weights=None):
    session = llm.session(memories=list(names), memory_weights=weights, store=store)
    session.read(TEXT)
    return next_logits(session)


def test_a_session_gives_what_peft_makes_of_the_adapter(llm, stocked):
    ours = logits_of(llm, stocked, "bees")
    session = llm.session()
    session.read(TEXT)
    ids = session._tape.driver.recent
    tokens = torch.tensor([[*ids, *session._tape.text.fork().finish()]])
    plain = peft.PeftModel.from_pretrained(tiny.byte_llama()[0], str(stocked.path("bees")))
    with torch.no_grad():
        theirs = plain(tokens).logits[0, -1]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, next_logits(session), atol=1e-2)


def test_sessions_with_other_memories_and_without_do_not_disturb_each_other(llm, stocked):
    alone = [logits_of(llm, stocked, name) for name in ("bees", "boats")]
    bare = llm.session()
    sessions = [llm.session(memories=[name], store=stocked) for name in ("bees", "boats")]
    before = None
    for piece in (TEXT[:9], TEXT[9:]):
        for session in (*sessions, bare):
            session.read(piece)
    for session, expected in zip(sessions, alone, strict=True):
        assert torch.allclose(next_logits(session), expected, atol=1e-5)
    before = next_logits(bare)
    assert torch.allclose(before, logits_without(llm), atol=1e-5)


def logits_without(llm):
    session = llm.session()
    session.read(TEXT)
    return next_logits(session)


def test_what_was_learned_with_dropout_answers_without(llm, stocked):
    made = record("dropping", base_hash=llm._attached.weights_hash, rank=8)
    stocked.add(made, adapter_of(tiny.byte_llama()[0], lora_dropout=0.5))
    assert torch.equal(logits_of(llm, stocked, "dropping"), logits_of(llm, stocked, "dropping"))
    assert torch.allclose(logits_of(llm, stocked, "dropping"), logits_of(llm, stocked, "bees"), atol=1e-5)


def test_several_are_the_weighted_sum_of_their_effects_and_weight_0_is_none(llm, stocked):
    assert torch.allclose(
        logits_of(llm, stocked, "bees", "boats", weights=[1, 0]), logits_of(llm, stocked, "bees"), atol=1e-4
    )
    assert torch.allclose(
        logits_of(llm, stocked, "bees", "boats", weights=[0, 0]), logits_without(llm), atol=1e-4
    )


def test_forks_keep_their_memories_and_reset_does_too(llm, stocked):
    session = llm.session(memories=["bees"], store=stocked)
    session.read(TEXT)
    expected = next_logits(session)
    assert torch.equal(next_logits(session.fork()), expected)
    session.reset()
    session.read(TEXT)
    assert torch.allclose(next_logits(session), expected, atol=1e-6)


def test_a_saved_session_goes_on_with_its_memories(llm, stocked, tmp_path):
    session = llm.session(memories=["bees"], store=stocked)
    session.read(TEXT)
    session.save(tmp_path / "a.state")
    restored = llm.restore(tmp_path / "a.state", store=stocked)
    assert restored.memories == session.memories
    assert torch.equal(next_logits(restored), next_logits(session))
    stocked.delete("bees")
    stocked.rename("boats", "bees")
    with pytest.raises(StateError, match="other memories than those now named bees"):
        llm.restore(tmp_path / "a.state", store=stocked)


def test_closing_leaves_no_trace(model, stocked):
    before = {name: type(module) for name, module in model.named_modules()}
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    ids = tiny.random_ids(1, 9)
    with torch.no_grad():
        expected = model(ids).logits
    with LLM(model, tiny.byte_tokenizer(), "tiny", FullAttention()) as llm:
        logits_of(llm, stocked, "bees")
        assert any("lora" in name for name, _ in model.named_modules())
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not hasattr(model, "peft_config")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_two_threads_each_with_its_own_memory(llm, stocked):
    expected = {name: logits_of(llm, stocked, name) for name in ("bees", "boats")}
    wrong = []

    def work(name):
        for _ in range(10):
            if not torch.allclose(logits_of(llm, stocked, name), expected[name], atol=1e-5):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memories_of_another_model_are_refused_by_name(llm, stocked):
    stocked.add(record("strange", base_model="other"), lora())
    with pytest.raises(ConfigurationError, match="'strange' was learned by 'other'"):
        llm.session(memories=["strange"], store=stocked)


def test_unknown_names_and_odd_arguments_are_refused(llm, stocked):
    with pytest.raises(UnknownNameError, match="did you mean 'bees'"):
        llm.session(memories=["beez"], store=stocked)
    with pytest.raises(ConfigurationError, match=r"\['handbook'\]"):
        llm.session(memories="bees", store=stocked)
    with pytest.raises(ConfigurationError, match="as many weights"):
        llm.session(memories=["bees"], memory_weights=[1, 2], store=stocked)


def test_a_model_with_adapters_of_its_own_takes_no_memories(stocked):
    model, tokenizer = tiny.byte_llama()
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    with LLM(adapted, tokenizer, "tiny", FullAttention()) as llm:
        stocked.add(record("own", base_hash=llm._attached.weights_hash), lora())
        with pytest.raises(UnsupportedUseError, match="adapters of PEFT's already"):
            llm.session(memories=["own"], store=stocked)


def test_what_does_not_fit_into_the_largest_rank_is_told(llm, stocked, model, monkeypatch):
    monkeypatch.setattr("everlong.memory.combine.RANKS", (8, 16))
    stocked.add(record("boots", base_hash=weights_hash(model), rank=8), adapter_of(model, 5))
    logits_of(llm, stocked, "bees", "boats")
    with pytest.warns(UserWarning, match="bees, boats, boots together need a rank above 16: .*left out"):
        logits_of(llm, stocked, "bees", "boats", "boots")


def test_weights_are_told_by_their_hash_once_for_all_memories(llm, stocked, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "everlong.reading.attached.weights_hash", lambda model: asked.append(1) or weights_hash(model)
    )
    for memories in (["bees", "boats"], "auto"):
        recalled = known_memories(llm._attached, memories, None, stocked)
        assert len(asked) == 1, recalled
        asked.clear()
