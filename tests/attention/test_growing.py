"""Steps of writing in windows that are not full, recorded: what they see becomes more from step to step."""

import copy
import warnings
import weakref

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, InfLLM, LMInfinite, Recall, attach
from everlong.attention.static_step import StaticStep, _Kind
from everlong.kernels import loading
from everlong.kernels.calls import turn_and_put
from everlong.kernels.team import has_team
from tests.attention.test_recording import build, close, read, write
from tests.attention.trace_recorder import CountedTapes, PlainTapes, TraceRecorder

pytestmark = pytest.mark.skipif(not (loading.wanted() and has_team()), reason="there are no kernels here")

READ, GROWTH = 10, 64  # tokens; and slots that a buffer gets more, at least
RECALL = Recall(window=120, sinks=4, recalled=32, block=8)
POLICIES = {
    "full": FullAttention(),
    "recall": RECALL,
    "lm-infinite": LMInfinite(window=120, sinks=4),
    "from the start": LMInfinite(window=120, sinks=0),
}
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi", "ministral3"]
BEFORE = TraceRecorder.eager_steps  # the next is recorded, and repeated to see whether it is right


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def attached(family, policy):
    handle = attach(build(family), policy)
    handle.steps.recorder = CountedTapes()
    return handle


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_repeated_while_windows_fill_and_buffers_become_larger(family, policy):
    with attached(family, POLICIES[policy]) as handle:
        ours, theirs = read(handle, READ)
        assert write(handle, ours, theirs, GROWTH) > GROWTH - 3 * BEFORE
        assert write(handle, ours, theirs, GROWTH // 2, seed=2, undisturbed=True) > GROWTH // 4
        assert handle.steps.recorder.recorded > 1


@pytest.mark.parametrize("policy", ["recall", "lm-infinite"])
def test_what_was_put_in_while_growing_is_seen_and_recalled_later(policy):
    with attached("llama", POLICIES[policy]) as handle:
        ours, theirs = read(handle, READ)
        write(handle, ours, theirs, 300)
        more = tiny.random_ids(1, 70, seed=5)
        found, expected = (handle.model(more, **tiny.cached(cache)).logits for cache in (ours, theirs))
        close(found, expected)


def test_after_a_larger_buffer_a_step_is_recorded_at_once():
    with attached("llama", RECALL) as handle:
        ours, theirs = read(handle, READ)
        repeated = write(handle, ours, theirs, 100)
        recorded = handle.steps.recorder.recorded
        assert recorded == 2
        assert repeated == 100 - BEFORE - 2  # the last slot of a buffer, and the first of the next, are eager


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox", "glm4", "gpt_oss", "smollm3"])
def test_what_no_kernel_attends_to_is_eager_until_windows_are_full(family):
    with attached(family, LMInfinite(window=20, sinks=3)) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write(handle, *read(handle, READ), 9) == 0
        assert handle.steps.recorder.recorded == 0
        assert write(handle, *read(handle, 30), 20) == 20 - BEFORE


def test_a_policy_that_takes_note_of_every_token_sees_it():
    policy = InfLLM(window=120, sinks=4, recalled=32, block=8, representatives=2)
    with attached("llama", policy) as handle:
        assert write(handle, *read(handle, READ), 30) == 0


@pytest.mark.parametrize("recorder", [PlainTapes, TraceRecorder])
def test_without_kernels_steps_are_eager_until_windows_are_full(recorder):
    with attach(build("llama"), RECALL) as handle:
        handle.steps.recorder = recorder()
        assert write(handle, *read(handle, READ), 30) == 0


def test_windows_of_layers_of_their_own_may_be_full_before():
    with attached("gemma3_text", RECALL) as handle:  # theirs are of 8
        ours, theirs = read(handle, 4)
        assert write(handle, ours, theirs, 40) == 40 - BEFORE - BEFORE


def test_padded_rows_run_eagerly_until_their_windows_are_full():
    with attached("llama", LMInfinite(window=40, sinks=3)) as handle:
        ids, mask = tiny.left_padded([20, 13])
        ours, theirs = read(handle, 20, rows=2, mask=mask)
        assert write(handle, ours, theirs, 18) == 0
        assert write(handle, *read(handle, 20, rows=2), 18) == 18 - BEFORE


def test_tables_that_follow_the_length_run_eagerly():
    model = tiny.build("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0})
    with attach(model, FullAttention()) as handle:
        handle.steps.recorder = CountedTapes()
        assert write(handle, *read(handle, READ), 90) == 0


def test_nor_in_windows_of_layers_own_that_are_wider_than_the_policys():
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    model = tiny.build("mistral", sliding_window=300, max_position_embeddings=40, rope_scaling=scaling)
    with attach(model, LMInfinite(window=20, sinks=3)) as handle:
        handle.steps.recorder = CountedTapes()
        assert write(handle, *read(handle, 25), 40) == 0
    with attach(tiny.build("mistral", sliding_window=300), LMInfinite(window=20, sinks=3)) as handle:
        handle.steps.recorder = CountedTapes()
        assert write(handle, *read(handle, 25), 40) == 40 - BEFORE - 2  # in a larger buffer since


# --- what comes in between ----------------------------------------------------------------------------


@pytest.fixture
def handle():
    with attached("llama", RECALL) as found:
        yield found


def test_chunks_read_in_between_let_go_of_buffers_that_become_larger(handle):
    ours, theirs = read(handle, READ)
    assert write(handle, ours, theirs, 20) == 20 - BEFORE
    for length in (10, 40):
        buffer = weakref.ref(next(iter(ours.memories.values())).keys)
        chunk = tiny.random_ids(1, length, seed=3)
        close(*(handle.model(chunk, **tiny.cached(cache)).logits for cache in (ours, theirs)))
        assert ours.recorded is None and (buffer() is None) == (length == 40)
        write(handle, ours, theirs, 6, seed=4)


@pytest.mark.parametrize("kept", [[], [0, 2], None], ids=["none", "some", "all"])
def test_tokens_run_tentatively_in_between(handle, kept):
    ours, theirs = read(handle, READ)
    write(handle, ours, theirs, 20)
    for cache in (ours, theirs):
        with cache.provisional():
            handle.model(tiny.random_ids(1, 3, seed=6), **tiny.cached(cache))
        cache.rollback() if kept == [] else cache.commit(kept)
    assert write(handle, ours, theirs, 12, seed=7) > 0


def test_forks_and_restored_caches_are_recorded_anew(handle):
    ours, theirs = read(handle, READ)
    write(handle, ours, theirs, 20)
    forks = [copy.deepcopy(cache) for cache in (ours, theirs)]
    assert write(handle, *forks, 20, seed=8) == 20 - BEFORE
    assert write(handle, ours, theirs, 20, seed=9) == 20
    restored = [handle.restore_cache(*cache.state()) for cache in (ours, theirs)]
    assert write(handle, *restored, 20, seed=10) == 20 - BEFORE


def test_far_from_the_start_of_a_stream_frames_are_as_near():
    with attached("llama", POLICIES["lm-infinite"]) as handle:
        ours, theirs = read(handle, READ, offset=200_000_000)
        assert write(handle, ours, theirs, 40) == 40 - BEFORE


# --- what fails ---------------------------------------------------------------------------------------


def _baked_count(monkeypatch):
    aim_at = _Kind.aim_at

    def with_one_number(kind, aim):
        before = int(kind._count)
        aim_at(kind, aim)
        if before:
            kind._count.fill_(before)

    monkeypatch.setattr(_Kind, "aim_at", with_one_number)


def _no_raw_keys(monkeypatch):
    monkeypatch.setattr(
        "everlong.attention.token_step.turn_and_put", lambda *given: turn_and_put(*given[:9], None)
    )


def _baked_position(monkeypatch):
    monkeypatch.setattr(StaticStep, "_position", lambda *_: 3)


MISTAKES = {
    _baked_count: "llama",
    _no_raw_keys: "llama",
    _baked_position: "ministral3",  # scales queries by their positions
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_recording_that_differs_is_dropped_but_not_those_of_full_windows(mistake, monkeypatch):
    with attached(MISTAKES[mistake], POLICIES["recall"]) as handle:
        with monkeypatch.context() as context:
            mistake(context)
            with pytest.warns(UserWarning, match="until windows are full.*something else"):
                assert write(handle, *read(handle, 70), 12) == 1  # to see whether it is right
        assert write(handle, *read(handle, 70), 12) == 0
        ours, theirs = read(handle, 130, policy=POLICIES["lm-infinite"])
        assert write(handle, ours, theirs, 12) == 12 - BEFORE
