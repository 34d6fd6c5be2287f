"""Steps between which only Everlong's own code runs: the model is seen at a glance, not looked at."""

from contextlib import closing

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import StreamingLLM, attach
from everlong.models.watch import ModelWatch
from tests.attention.test_recording import ENOUGH, TURNS, build, close, read, write
from tests.attention.test_recording import POLICIES as WINDOWED
from tests.attention.test_recording import handle as handle  # noqa: PLC0414 (a fixture)
from tests.attention.test_row_adapters import LORAS
from tests.attention.test_row_adapters import load as load_adapters
from tests.attention.trace_recorder import TraceRecorder
from tests.reading.conftest import POLICIES, TEXT, make_llm


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def looks(monkeypatch):
    """One entry for each time that a model is looked at."""
    seen, state = [], ModelWatch.state

    def counted(watch, **how):
        seen.append(watch)
        return state(watch, **how)

    monkeypatch.setattr(ModelWatch, "state", counted)
    return seen


def test_the_model_is_looked_at_only_where_others_may_have_run(handle, looks):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    looks.clear()
    assert write(handle, ours, theirs, TURNS, undisturbed=True) == TURNS
    assert len(looks) == 1  # before the first


BETWEEN = ["another output", "a chunk", "tokens taken back", "other rows", "gradients"]


@pytest.mark.parametrize("between", BETWEEN)
def test_a_step_after_something_else_is_right(handle, between):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    token = tiny.random_ids(1, 1, seed=5)
    for cache in (ours, theirs):
        if between == "another output":
            handle.step(cache, token, hidden=True)
        elif between == "a chunk":
            handle.model(tiny.random_ids(1, 3), **tiny.cached(cache))
        elif between == "tokens taken back":
            with cache.provisional():
                handle.model(tiny.random_ids(1, 3), **tiny.cached(cache))
            cache.rollback()
        elif between == "other rows":
            cache.batch_select_indices(torch.tensor([0, 0]))
        else:
            with torch.inference_mode(False), torch.enable_grad():
                handle.step(cache, token.clone(), undisturbed=True)
    ids = token.expand(ours.rows, 1)
    expected = handle.model(ids, **tiny.cached(theirs)).logits
    close(handle.step(ours, ids, undisturbed=True), expected)


@pytest.mark.parametrize("change", ["a hook", "training"])
def test_what_shows_at_a_glance_is_noticed_nevertheless(handle, looks, change):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    looks.clear()
    if change == "a hook":
        handle.decoder.layers[0].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    else:
        handle.model.train()
    token = tiny.random_ids(1, 1, seed=5)
    expected = handle.model(token, **tiny.cached(theirs)).logits
    close(handle.step(ours, token, undisturbed=True), expected)
    assert len(looks) == 1


def test_another_output_and_another_adapter_are_other_steps(looks):
    with attach(build("llama"), WINDOWED["lm-infinite"]) as handle:
        handle.steps.recorder = TraceRecorder()
        load_adapters(handle, LORAS)
        ours, theirs = read(handle)
        write(handle, ours, theirs, ENOUGH)
        token = tiny.random_ids(1, 1, seed=5)
        hidden = handle.decoder(token, **tiny.cached(theirs)).last_hidden_state
        close(handle.step(ours, token, hidden=True, undisturbed=True), hidden)
        write(handle, ours, theirs, ENOUGH)
        ours.adapter = theirs.adapter = next(iter(LORAS))
        expected = handle.model(token, **tiny.cached(theirs)).logits
        close(handle.step(ours, token, undisturbed=True), expected)


def test_tensors_that_a_policy_replaces_are_noticed(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    for cache in (ours, theirs):
        for memory in cache.memories.values():
            memory.values = memory.values / 2
    token = tiny.random_ids(1, 1, seed=5)
    expected = handle.model(token, **tiny.cached(theirs)).logits
    close(handle.step(ours, token, undisturbed=True), expected)


def test_a_stream_with_another_policy_is_no_stranger(handle):
    ours, theirs = read(handle, policy=StreamingLLM(window=20, sinks=3))
    write(handle, ours, theirs, ENOUGH)
    assert write(handle, ours, theirs, TURNS, undisturbed=True) == TURNS


# --- sessions -----------------------------------------------------------------------------------------


@pytest.fixture
def llm():
    with make_llm(POLICIES["lm-infinite"]) as made:
        made.handle.steps.recorder = TraceRecorder()
        yield made


def opened(llm):
    session = llm.session()
    session.read(TEXT)
    session.generate(max_new_tokens=2 * TraceRecorder.eager_steps)
    return session


def test_generate_looks_at_its_first_steps_and_stream_after_each_piece(llm, looks):
    session = opened(llm)
    for write_on, most in ((session.generate, 2), (lambda count: [*session.stream(count)], None)):
        looks.clear()
        pieces = write_on(20)
        assert len(looks) <= most if most else len(pieces) / 2 < len(looks) <= 20


def test_generate_together_looks_once(llm, looks):
    sessions = [opened(llm), opened(llm)]
    llm.generate_together(sessions, max_new_tokens=3 * TraceRecorder.eager_steps)
    before = len(looks)
    llm.generate_together(sessions, max_new_tokens=3 * TraceRecorder.eager_steps + 20)
    assert len(looks) - before < 3 * TraceRecorder.eager_steps


def other_layer(handle):
    """Put another layer in; return what takes it out again."""
    mlp = handle.decoder.layers[0].mlp
    kept = mlp.down_proj
    mlp.down_proj = torch.nn.Linear(kept.in_features, kept.out_features, bias=False)
    torch.nn.init.ones_(mlp.down_proj.weight)
    return lambda: setattr(mlp, "down_proj", kept)


def test_a_model_changed_after_a_text_that_ended_is_looked_at_though_nothing_ran_yet(llm):
    session = opened(llm)
    session.generate(max_new_tokens=2 * TraceRecorder.eager_steps)
    session._tape.queue = []  # as after an end token, which is not kept: the next token is known already
    reference, undo = session.fork(), other_layer(llm.handle)
    ours = session.generate(max_new_tokens=20).text
    llm.handle.steps.stop()
    theirs = reference.generate(max_new_tokens=20).text
    undo()
    assert ours == theirs


def test_a_model_changed_between_two_pieces_of_several_sessions_writes_on_as_it_is_now(llm):
    sessions, texts = [opened(llm), opened(llm)], []
    forks = [session.fork() for session in sessions]
    for those, is_eager in ((sessions, False), (forks, True)):
        llm.handle.steps.stop()
        llm.handle.steps.recorder = None if is_eager else TraceRecorder()
        with closing(llm.stream_together(those, max_new_tokens=40)) as pieces:
            text = [next(pieces) for _ in range(24)]
            undo = other_layer(llm.handle)
            text += pieces
        undo()
        texts.append(text)
    assert texts[0] == texts[1]


def test_a_model_changed_between_two_pieces_writes_on_as_it_is_now(llm):
    session = opened(llm)
    reference = session.fork()
    texts = []
    for each, is_eager in ((session, False), (reference, True)):
        llm.handle.steps.stop()
        llm.handle.steps.recorder = None if is_eager else TraceRecorder()
        with closing(each.stream(40)) as pieces:
            text = [next(pieces) for _ in range(15)]
            undo = other_layer(llm.handle)
            text += pieces
        undo()
        texts.append("".join(text))
    assert texts[0] == texts[1]
