"""Steps between which only Everlong's own code runs: the model is seen at a glance, not looked at."""

from contextlib import closing

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import StreamingLLM
from everlong.models.watch import ModelWatch
from tests.attention.test_recording import ENOUGH, TURNS, close, read, write
from tests.attention.test_recording import handle as handle  # noqa: PLC0414 (a fixture)
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


def test_generate_looks_once_and_stream_after_each_piece(llm, looks):
    session = opened(llm)
    for write_on, most in ((session.generate, 1), (lambda count: [*session.stream(count)], None)):
        looks.clear()
        pieces = write_on(20)
        assert len(looks) <= most if most else len(pieces) / 2 < len(looks) <= 20


def test_generate_together_looks_once(llm, looks):
    sessions = [opened(llm), opened(llm)]
    llm.generate_together(sessions, max_new_tokens=3 * TraceRecorder.eager_steps)
    before = len(looks)
    llm.generate_together(sessions, max_new_tokens=3 * TraceRecorder.eager_steps + 20)
    assert len(looks) - before < 3 * TraceRecorder.eager_steps


def test_a_model_changed_between_two_pieces_writes_on_as_it_is_now(llm):
    session = opened(llm)
    reference = session.fork()
    texts = []
    for each, is_eager in ((session, False), (reference, True)):
        llm.handle.steps.recorder = None if is_eager else TraceRecorder()
        layer = llm.handle.decoder.layers[0].mlp
        kept = layer.down_proj
        with closing(each.stream(40)) as pieces:
            text = [next(pieces) for _ in range(15)]
            layer.down_proj = torch.nn.Linear(kept.in_features, kept.out_features, bias=False)
            torch.nn.init.ones_(layer.down_proj.weight)
            text += pieces
        layer.down_proj = kept
        texts.append("".join(text))
    assert texts[0] == texts[1]
