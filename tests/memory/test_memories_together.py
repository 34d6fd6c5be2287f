"""Sessions with memories of their own write in the same forwards: each what it would write alone."""

from contextlib import contextmanager

import pytest
import torch

from everlong import LLM, FullAttention, LMInfinite
from everlong.models.fingerprint import weights_hash
from everlong.reading import Sampling
from everlong.reading.memories import Memories
from everlong.reading.rows import read_all
from tests import tiny
from tests.memory.adapters import adapter_of, record
from tests.reading.conftest import TEXT, ids_of, next_logits

MEMORIES = (["bees"], [], ["boats"], ["bees", "boats"], ["bees"])
LENGTHS = (300, 41, 12, 3, 90)
ALIKE = (None,) * 5
GIVEN = (None, FullAttention(), None, LMInfinite(sinks=2, window=30, top_k=3), None)
QUESTIONS = ["a", "bc", "def", "g" * 30, "Who?"]


@contextmanager
def opened(weights="float"):
    model, tokenizer = tiny.byte_llama(eos_token_id=None)
    with LLM(model, tokenizer, "tiny", LMInfinite(sinks=4, window=40), weights) as llm:
        yield llm


@pytest.fixture
def llm():
    with opened() as made:
        yield made


@pytest.fixture
def stocked(store):
    """A store with two memories, of different rank and on different layers."""
    model, _ = tiny.byte_llama(eos_token_id=None)
    base = weights_hash(model)
    store.add(record("bees", base_hash=base, rank=8), adapter_of(model))
    boats = adapter_of(model, 1, ["v_proj", "down_proj"], 16, layers_to_transform=[1])
    store.add(record("boats", base_hash=base, rank=16), boats)
    return store


def new_sessions(llm, store, policies=ALIKE):
    return [
        llm.session(policy, memories=names, store=store, seed=number)
        for number, (names, policy) in enumerate(zip(MEMORIES, policies, strict=True))
    ]


def sessions_of(llm, store, policies=ALIKE):
    """Five that have read texts of very different length."""
    sessions = new_sessions(llm, store, policies)
    for number, (session, length) in enumerate(zip(sessions, LENGTHS, strict=True)):
        session.read(TEXT[number : number + length])
    return sessions


@contextmanager
def counted(llm):
    """Shapes of the input of each forward within the block."""
    shapes = []
    hook = llm.handle.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.parametrize("policies", [ALIKE, GIVEN], ids=["rows of a batch", "packed"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, repetition_penalty=1.2)], ids=["greedy", "drawn"]
)
def test_each_writes_what_it_would_alone_and_goes_on_alone(llm, stocked, policies, sampling):
    sessions = sessions_of(llm, stocked, policies)
    expected = [session.fork() for session in sessions]
    with counted(llm) as shapes:
        together = llm.generate_together(sessions, 60, sampling=sampling)
    assert len(shapes) == 60, "one forward a token, the first also reads what waits"
    assert shapes[1] == ((5, 1) if policies is ALIKE else (1, 5))
    for session, other, generation in zip(sessions, expected, together, strict=True):
        assert generation.text == other.generate(60, sampling=sampling).text
        assert ids_of(session) == ids_of(other)
        torch.testing.assert_close(next_logits(session), next_logits(other), atol=1e-4, rtol=0)
        assert session.generate(5).text == other.generate(5).text


@pytest.mark.parametrize("policies", [ALIKE, GIVEN], ids=["rows of a batch", "packed"])
def test_they_may_stop_at_different_times(llm, stocked, policies):
    sessions = sessions_of(llm, stocked, policies)
    alone = [session.fork().generate(30).text for session in sessions]
    stops = [text[4 * number + 3 : 4 * number + 5] for number, text in enumerate(alone)]
    expected = [session.fork().generate(30, stop=stops) for session in sessions]
    together = llm.generate_together(sessions, 30, stop=stops)
    assert len({generation.tokens for generation in expected}) > 2
    for generation, other in zip(together, expected, strict=True):
        assert (generation.text, generation.stop_reason) == (other.text, other.stop_reason)


def test_short_prompts_are_read_in_one_forward(llm, stocked):
    sessions = new_sessions(llm, stocked)
    with counted(llm) as shapes:
        answers = llm.ask_together(sessions, QUESTIONS, max_new_tokens=12)
    assert [rows for rows, _ in shapes] == [1] + [5] * 11 and shapes[0][1] > 40
    for session, question, answer in zip(sessions, QUESTIONS, answers, strict=True):
        assert answer.text == session.ask(question, max_new_tokens=12).text


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_short_prompts_are_read_by_packed_weights_as_they_would_be_alone(stocked, weights):
    with opened(weights) as llm:
        sessions, alone = new_sessions(llm, stocked), new_sessions(llm, stocked)
        for session, other, question in zip(sessions, alone, QUESTIONS, strict=True):
            for each in (session, other):
                each.to_answer(question, keep=True)
        with counted(llm) as shapes:
            read_all([session._tape for session in sessions], 512)
        assert len(shapes) < len(sessions)
        for session, other in zip(sessions, alone, strict=True):
            other._tape.run_all(512, logits=True)
            ours, theirs = session._tape.driver.logits, other._tape.driver.logits
            assert (ours - theirs).abs().max() <= 2**-6 * theirs.abs().max()


def test_one_that_has_left_can_be_saved_and_restored(llm, stocked, tmp_path):
    sessions = sessions_of(llm, stocked)
    llm.generate_together(sessions, 10)
    for number, session in enumerate(sessions):
        path = tmp_path / f"{number}.state"
        session.save(path)
        restored = llm.restore(path, store=stocked)
        assert restored.memories == session.memories
        assert torch.equal(next_logits(restored), next_logits(session))


def test_a_memory_that_is_not_plain_lora_writes_in_forwards_of_its_own(llm, stocked):
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny.byte_llama()[0], config)
    llm.handle.adapters.load("dora", config, peft.get_peft_model_state_dict(adapted))
    sessions = new_sessions(llm, stocked)
    for number in (1, 4):
        sessions[number]._memories = Memories(("dora",), (1.0,), "dora")
    with counted(llm) as shapes:
        answers = llm.ask_together(sessions, QUESTIONS, max_new_tokens=5)
    assert len(shapes) == 2 * 5 and {2, 3} == {tokens for _, tokens in shapes[2:]}
    for session, question, answer in zip(sessions, QUESTIONS, answers, strict=True):
        assert answer.text == session.ask(question, max_new_tokens=5).text
