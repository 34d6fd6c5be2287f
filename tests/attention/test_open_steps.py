"""Steps whose attention is left open: what a policy decides is decided in each, and the rest repeated."""

import gc
import warnings
import weakref
from unittest.mock import patch

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import (
    H2O,
    DualChunk,
    FullAttention,
    InfLLM,
    LMInfinite,
    Quest,
    ReAttention,
    Recall,
    SelfExtend,
    attach,
    open_recording,
)
from everlong.attention.call_tape import CallTapes
from everlong.attention.open_step import OpenStep
from everlong.errors import StateError, UnsupportedUseError
from tests.attention.test_recording import close, read
from tests.attention.trace_recorder import CountedTapes, PlainTapes, TraceRecorder
from tests.ties import on_one_stream

RECALL = Recall(window=40, sinks=4, recalled=8, block=4, steps=3)
POLICIES = {
    "recall": RECALL,
    "inf-llm": InfLLM(window=40, sinks=4, recalled=8, block=4, representatives=2),
    "quest": Quest(window=40, sinks=4, recalled=8, block=4),
    "re-attention": ReAttention(window=40, sinks=4, recalled=9, radius=1),
    "h2o": H2O(window=24),
    "top_k": LMInfinite(window=20, sinks=3, top_k=2, top_k_layers=1),
    "full with a ceiling": FullAttention(ceiling=6),
    "self-extend": SelfExtend(neighbours=16, group_size=4),
    "dual-chunk": DualChunk(),
}
FAMILIES = ["llama", "gemma3_text", "gemma2", "phi", "gemma4_text", "ministral3"]
BEFORE = TraceRecorder.eager_steps
COUNT = BEFORE + 1 + 20
LENGTH = 60


@pytest.fixture(autouse=True, params=["inference", "no_grad"])
def _mode(request):
    with torch.inference_mode() if request.param == "inference" else torch.no_grad():
        yield


def attached(family, policy, tapes=CountedTapes, **overrides):
    with torch.inference_mode(False):
        handle = attach(tiny.build(family, **overrides), policy)
    handle.steps.recorder = None
    handle.steps.open.recorder = tapes()
    return handle


def write(handle, ours, theirs, count=COUNT, seed=1, undisturbed=False):
    """Write the same tokens on both, hold them against each other, and return how many were repeated."""
    recorder = handle.steps.open.recorder
    before = getattr(recorder, "replayed", 0)
    ids = tiny.random_ids(ours.rows, count, seed=seed)
    for at in range(count):
        token = ids[:, at : at + 1]
        expected = handle.model(token, **tiny.cached(theirs)).logits
        close(handle.step(ours, token, undisturbed=undisturbed and at > 0), expected)
        assert ours.seen == theirs.seen
    return getattr(recorder, "replayed", 0) - before


@pytest.mark.parametrize("tapes", [CountedTapes, PlainTapes])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_repeated_steps_equal_eager_ones(family, policy, tapes):
    def check(seed):
        with attached(family, POLICIES[policy], tapes) as handle:
            ours, theirs = read(handle, LENGTH)
            assert write(handle, ours, theirs, seed=2 * seed + 1) == COUNT - BEFORE
            assert write(handle, ours, theirs, 20, seed=2 * seed + 2, undisturbed=True) == 20
            assert ours.bytes() == theirs.bytes()

    on_one_stream(check) if policy == "re-attention" else check(0)


def test_a_window_that_fills_meanwhile():
    with attached("llama", RECALL) as handle:
        assert write(handle, *read(handle, 10), 80) == 80 - BEFORE


def test_padded_rows():
    with attached("llama", RECALL) as handle:
        ids, mask = tiny.left_padded([60, 38])
        ours, theirs = read(handle, 60, rows=2, mask=mask)
        assert write(handle, ours, theirs) == COUNT - BEFORE


def test_of_two_recordings_the_one_that_is_repeated_is_held():
    """A padded row's window is not full at first: until then steps are not static."""
    with attached("llama", LMInfinite(window=40, sinks=4)) as handle:
        handle.steps.recorder = CountedTapes()
        ids, mask = tiny.left_padded([60, 20])
        ours, theirs = read(handle, 60, rows=2, mask=mask)
        assert write(handle, ours, theirs, 20) == 20 - BEFORE
        assert ours.recorded_open.replay is not None and ours.recorded is None
        write(handle, ours, theirs, COUNT)
        assert ours.recorded_open is None and ours.recorded.replay is not None


def test_tables_that_follow_the_length():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with attached("llama", FullAttention(), rope_scaling=scaling) as handle:
        assert write(handle, *read(handle, LENGTH)) == COUNT - BEFORE


def test_what_is_read_in_between_needs_no_new_recording():
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, LENGTH)
        write(handle, ours, theirs)
        more = tiny.random_ids(1, 70, seed=5)
        close(*(handle.model(more, **tiny.cached(cache)).logits for cache in (ours, theirs)))
        assert write(handle, ours, theirs, 20, seed=3) == 20
        assert handle.steps.open.recorder.recorded == 1


def test_a_fork_gets_a_recording_of_its_own():
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, LENGTH)
        write(handle, ours, theirs)
        fork, other = ours.fork(), theirs.fork()
        assert fork.recorded_open is None and ours.recorded_open is not None
        write(handle, fork, other, seed=7)
        assert write(handle, ours, theirs, 10, seed=8) == 10


def test_rows_in_another_order_are_recorded_anew():
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, LENGTH, rows=3)
        write(handle, ours, theirs)
        for cache in (ours, theirs):
            cache.batch_select_indices(torch.tensor([2, 0]))
        assert ours.recorded_open is None
        assert write(handle, ours, theirs) == COUNT - BEFORE


def test_a_model_that_changes_is_recorded_anew():
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, LENGTH)
        write(handle, ours, theirs)
        layer = handle.decoder.layers[0].mlp.down_proj
        with torch.inference_mode(False):
            layer.weight = torch.nn.Parameter(layer.weight * 2)
        assert write(handle, ours, theirs) == COUNT - BEFORE
        assert handle.steps.open.recorder.recorded == 2


def test_a_static_window_is_left_to_the_other_recorder():
    with attached("llama", LMInfinite(window=20, sinks=3)) as handle:
        handle.steps.recorder = CountedTapes()
        assert write(handle, *read(handle, LENGTH)) == 0
        assert handle.steps.recorder.replayed == COUNT - BEFORE


def test_steps_are_recorded_as_an_attachment_is_made():
    with attach(tiny.build("llama"), RECALL) as handle:
        assert isinstance(handle.steps.open.recorder, CallTapes)
        ours, theirs = read(handle, LENGTH)
        write(handle, ours, theirs, CallTapes.eager_steps)
        assert ours.recorded_open.replay is None
        write(handle, ours, theirs, 2)
        assert ours.recorded_open.replay is not None
    assert handle.steps.open.recorder is None


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_that_python_chooses_are_not_recorded_or_right(family):
    with attached(family, RECALL) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        write(handle, *read(handle, LENGTH))


# --- what goes wrong ------------------------------------------------------------------------------------


def _baked_tokens(monkeypatch):
    place = OpenStep.place
    monkeypatch.setattr(OpenStep, "place", lambda step, ids, positions: place(step, step.ids, positions))


def test_a_token_that_was_baked_in_makes_repeated_steps_wrong(monkeypatch):
    """That the tests above would see it: without the check against the step that was not recorded."""
    monkeypatch.setattr(open_recording, "agree", lambda *_: True)
    _baked_tokens(monkeypatch)
    with attached("llama", RECALL) as handle, pytest.raises(AssertionError, match="not close"):
        write(handle, *read(handle, LENGTH))


class _Wrong(CountedTapes):
    """Repeats a step with the tokens it was recorded with."""

    def record(self, run):
        replay, result = super().record(run)
        kept = result.clone()

        def wrong():
            replay()
            with torch.inference_mode():
                result.copy_(kept)

        return wrong, result


def test_a_recording_that_differs_is_dropped_and_reported_once():
    with attached("llama", RECALL, _Wrong) as handle:
        ours, theirs = read(handle, LENGTH)
        with pytest.warns(UserWarning, match="step of writing was dropped.*something else") as reports:
            write(handle, ours, theirs)
            write(handle, *read(handle, LENGTH))
        assert len([report for report in reports if "dropped" in str(report.message)]) == 1
        assert ours.recorded_open is None and handle.steps.open.recorder is None


class _Skipping(CountedTapes):
    """Repeats a step without its last layer's attention, of which it kept what that gave."""

    def record(self, run):
        replay, result = super().record(run)
        attend = OpenStep.attend

        def kept(step, number, given, **logits):
            return step._outputs[number].clone() if number == 1 else attend(step, number, given, **logits)

        def skips():
            with patch.object(OpenStep, "attend", kept):
                replay()

        return skips, result


def test_a_recording_that_gives_the_same_without_a_layer_is_dropped():
    with attached("llama", RECALL, _Skipping) as handle:
        with pytest.warns(UserWarning, match="step of writing was dropped.*something else"):
            write(handle, *read(handle, LENGTH))
        assert handle.steps.open.recorder is None


class _Refusing(CountedTapes):
    def record(self, run):
        run()
        raise RuntimeError("no room for a tape")


def test_a_recorder_that_fails_costs_a_warning_and_no_token():
    reported = pytest.warns(UserWarning, match="step of writing was dropped.*RuntimeError: no room")
    with attached("llama", RECALL, _Refusing) as handle, reported:
        write(handle, *read(handle, LENGTH))


def test_a_step_that_fails_half_way_leaves_the_cache_half_done(monkeypatch):
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, LENGTH)
        write(handle, ours, theirs)
        attend, layers = OpenStep.attend, []

        def failing(step, number, given, **logits):
            layers.append(number)
            return attend(step, number, given, **logits) if number == 0 else 1 / 0

        monkeypatch.setattr(OpenStep, "attend", failing)
        with pytest.raises(ZeroDivisionError):
            handle.step(ours, torch.tensor([[5]]))
        assert layers == [0, 1]
        with pytest.raises(StateError, match="ended in an error"):
            handle.step(ours, torch.tensor([[5]]))


def test_a_recording_that_leaves_a_layer_out_says_so(monkeypatch):
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, LENGTH)
        write(handle, ours, theirs)
        ours.recorded_open.replay = lambda: None
        with pytest.raises(UnsupportedUseError, match="0 of 2 layers followed"):
            handle.step(ours, torch.tensor([[5]]))


def test_with_gradients_or_autocast_steps_run_eagerly():
    with attached("llama", RECALL) as handle:
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = read(handle, LENGTH)
            assert write(handle, ours, theirs) == 0 and ours.recorded_open is None
        ours, theirs = read(handle, LENGTH)
        assert write(handle, ours, theirs) > 0
        before = handle.steps.open.recorder.replayed
        with torch.inference_mode(False), torch.enable_grad():
            found = handle.step(ours, torch.tensor([[5]]))
        assert found.requires_grad and handle.steps.open.recorder.replayed == before


def test_a_recording_is_freed_with_its_cache():
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, LENGTH)
        write(handle, ours, theirs)
        step = weakref.ref(ours.recorded_open.step)
        assert not step().given and not step()._outputs
        del ours
        gc.collect()
        assert step() is None


def test_what_was_written_repeated_can_be_written_into_in_another_mode():
    """Notes that policies take while a step is repeated are of the caller's mode, not of the recording's."""
    for policy in POLICIES.values():
        with attached("llama", policy) as handle:
            ours, theirs = read(handle, LENGTH)
            with torch.no_grad():
                write(handle, ours, theirs)
            with torch.inference_mode(False), torch.no_grad():
                more = tiny.random_ids(1, 20, seed=5)
                close(*(handle.model(more, **tiny.cached(cache)).logits for cache in (ours, theirs)))
