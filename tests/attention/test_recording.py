"""A step of writing, recorded and repeated, gives what it gives run eagerly, whatever happens in between.

Two recorders: the CPU's own, and one that repeats operations on the very tensors they were recorded on, as
CUDA graphs do.
"""

import gc
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import FullAttention, LMInfinite, StreamingLLM, attach, layer_memory, recording
from everlong.attention.aim import aims
from everlong.attention.call_tape import CallTapes
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.static_step import StaticStep
from everlong.errors import StateError
from everlong.kernels.calls import turn_and_put
from everlong.models import lean_layers
from tests.attention.test_row_adapters import LORAS
from tests.attention.test_row_adapters import load as load_adapters
from tests.attention.trace_recorder import RECORDERS, TraceRecorder

W, G = 20, 3
TURNS = 3 * (W - G)
POLICIES = {
    "lm-infinite": LMInfinite(window=W, sinks=G),
    "no sinks": LMInfinite(window=W, sinks=0),
    "streaming-llm": StreamingLLM(window=W, sinks=G),
}
FAMILIES = ["llama", "qwen3", "gemma3_text", "phi", "gemma2", "gpt_oss", "smollm3", "gpt_neox", "ministral3"]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def build(family):
    with torch.inference_mode(False):
        return tiny.build(family)


@pytest.fixture(params=RECORDERS)
def handle(request):
    with attach(build("llama"), POLICIES["lm-infinite"]) as attached:
        attached.steps.recorder = RECORDERS[request.param]()
        yield attached


def read(handle, length=30, rows=1, offset=0, mask=None, policy=None):
    """Two caches that have read the same: one to be written on with recordings, one eagerly."""
    caches = [handle.new_cache(policy, offset=offset) for _ in range(2)]
    ids = tiny.random_ids(rows, length)
    for cache in caches:
        handle.model(ids, attention_mask=mask, **tiny.cached(cache))
    return caches


def write(handle, ours, theirs, count, seed=1, undisturbed=False):
    """Write the same tokens on both, hold them against each other, and return how many were repeated."""
    recorder = handle.steps.recorder
    before = getattr(recorder, "replayed", 0)
    ids = tiny.random_ids(ours.rows, count, seed=seed)
    for at in range(count):
        token = ids[:, at : at + 1]
        expected = handle.model(token, **tiny.cached(theirs)).logits
        close(handle.step(ours, token, undisturbed=undisturbed and at > 0), expected)
        assert ours.seen == theirs.seen
        assert ours.bytes() == theirs.bytes()
    return getattr(recorder, "replayed", 0) - before


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


REPEATED = TURNS  # of the steps written below; those before are eager, and one that is recorded is checked
ENOUGH = TraceRecorder.eager_steps + 1 + TURNS


# --- exactness ----------------------------------------------------------------------------------------


@pytest.mark.thin
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("code", ["lean", "the model's own"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_three_turns_of_the_ring_repeated_equal_eager_steps(family, policy, code, recorder, monkeypatch):
    if code != "lean":
        monkeypatch.setattr(lean_layers, "MOST_ROWS", 0)
    with attach(build(family), POLICIES[policy]) as handle:
        handle.steps.recorder = RECORDERS[recorder]()
        ours, theirs = read(handle)
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
        assert write(handle, ours, theirs, TURNS, undisturbed=True) == TURNS
        assert handle.steps.recorder.recorded == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_that_python_chooses_are_not_recorded_or_right(family):
    with attach(build(family), POLICIES["lm-infinite"]) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.steps.recorder = RECORDERS["a CPU's"]()
        write(handle, *read(handle), ENOUGH)


@pytest.mark.parametrize("output", ["logits", "hidden states"])
def test_what_is_returned_stays_when_the_next_step_is_repeated(handle, output):
    ours, theirs = read(handle)
    hidden = output == "hidden states"
    module = handle.decoder if hidden else handle.model
    ids, kept = tiny.random_ids(1, 12), []
    for at in range(12):
        kept.append(handle.step(ours, ids[:, at : at + 1], hidden=hidden))
    for at, found in enumerate(kept):
        expected = module(ids[:, at : at + 1], **tiny.cached(theirs))
        close(found, expected.last_hidden_state if hidden else expected.logits)
    assert handle.steps.recorder.replayed == 12 - TraceRecorder.eager_steps


def test_padded_rows_are_repeated_once_the_shortest_has_a_full_window(handle):
    lengths = [40, 23, 31]
    ids, mask = tiny.left_padded(lengths)
    ours, theirs = read(handle, 40, rows=3, mask=mask)
    assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
    short, eager = read(handle, 30, rows=3, mask=tiny.left_padded([30, 15, 30])[1])
    assert write(handle, short, eager, 7) == 0
    assert write(handle, short, eager, ENOUGH) == REPEATED + 1


def test_the_windows_may_fill_while_writing(handle):
    ours, theirs = read(handle, W - 8)
    while_growing = W - 1 - (W - 8) - TraceRecorder.eager_steps if handle.steps.recorder.grows else 0
    assert write(handle, ours, theirs, 8 + G - 1) == while_growing  # then the last sink is at the ceiling
    assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1


@pytest.mark.parametrize("undisturbed", [False, True])
@pytest.mark.parametrize("offset", [0, 200_000_000])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_frame_that_moves_again_and_again(handle, policy, offset, undisturbed, monkeypatch):
    monkeypatch.setattr(layer_memory, "FRAME", W + 7)
    ours, theirs = read(handle, offset=offset, policy=POLICIES[policy])
    before = ours.memories[0].origin
    assert write(handle, ours, theirs, ENOUGH, undisturbed=undisturbed) == REPEATED + 1
    assert ours.memories[0].origin > before + W
    assert handle.steps.recorder.recorded == 1


# --- what happens in between --------------------------------------------------------------------------


def test_a_fork_gets_a_recording_of_its_own(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    fork, eager = ours.fork(), theirs.fork()
    assert fork.recorded is None and ours.recorded is not None
    assert write(handle, fork, eager, ENOUGH, seed=2) == REPEATED + 1
    assert write(handle, ours, theirs, TURNS, seed=3) == TURNS
    assert write(handle, fork, eager, TURNS, seed=4) == TURNS
    assert handle.steps.recorder.recorded == 2


@pytest.mark.parametrize("kept", [[], [0, 2], None], ids=["none", "some", "all"])
def test_tokens_run_tentatively_in_between(handle, kept):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    for cache in (ours, theirs):
        with cache.provisional():
            handle.model(tiny.random_ids(1, 3), **tiny.cached(cache))
        cache.rollback() if kept == [] else cache.commit(kept)
    assert write(handle, ours, theirs, TURNS, seed=2) == TURNS
    with ours.provisional(), theirs.provisional():
        assert write(handle, ours, theirs, 3) == 0  # one by one, kept aside
    ours.rollback(), theirs.rollback()
    assert write(handle, ours, theirs, TURNS, seed=2) == TURNS


def test_chunks_read_in_between(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    for length in (2, W, 3 * W):
        for cache in (ours, theirs):
            handle.model(tiny.random_ids(1, length), **tiny.cached(cache))
        assert write(handle, ours, theirs, TURNS) == TURNS
    assert handle.steps.recorder.recorded == 1


def test_a_saved_and_restored_cache_is_recorded_anew(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    tensors, meta = ours.state()
    assert not [name for name in tensors if "record" in name] and "recorded" not in meta
    restored = handle.restore_cache(tensors, meta)
    assert restored.recorded is None
    assert write(handle, restored, theirs, ENOUGH, seed=2) == REPEATED + 1


def test_rows_in_another_order_are_recorded_anew(handle):
    ours, theirs = read(handle, rows=3)
    write(handle, ours, theirs, ENOUGH)
    for rows in ([2, 0, 1], [1, 1, 0], [0, 2]):
        for cache in (ours, theirs):
            cache.reorder_cache(torch.tensor(rows))
        assert ours.recorded is None
        assert write(handle, ours, theirs, ENOUGH, seed=len(rows)) == REPEATED + 1
    ours.reset()
    assert ours.recorded is None


def test_buffers_that_become_others_are_recorded_anew(handle):
    ours, theirs = read(handle)
    for name in ("keys", "values", "sink_keys"):
        write(handle, ours, theirs, ENOUGH)
        memory = ours.memories[1]
        before = getattr(memory, name)
        with torch.inference_mode(False):
            setattr(memory, name, before.clone())
        before.fill_(7.0)
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1


def test_a_hook_that_comes_later_is_called_in_every_step(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    called = []
    for add in (
        lambda: handle.decoder.layers[0].mlp.register_forward_hook(lambda *_: called.append(1)),
        lambda: handle.decoder.register_forward_pre_hook(lambda *_: called.append(1)),
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda *_: called.append(1)),
    ):
        called.clear()
        hook = add()
        try:
            assert write(handle, ours, theirs, 9) == 0
        finally:
            hook.remove()
        assert len(called) >= 2 * 9
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1


def _new_data(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = 1.5 * weight.data


def _new_parameter(model):
    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = torch.nn.Parameter(-projection.weight)


def _other_module(model):
    other = torch.nn.Linear(32, tiny.VOCAB, bias=False)
    other.weight.data = 2 * model.lm_head.weight.data
    model.lm_head = other


def _other_forward(model):
    norm = model.model.norm
    norm.forward = lambda x: 0.5 * type(norm).forward(norm, x)


@pytest.mark.parametrize("change", [_new_data, _new_parameter, _other_module, _other_forward])
def test_a_model_that_changes_is_recorded_anew(handle, change):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    before = handle.step(ours.fork(), torch.tensor([[5]]))
    with torch.inference_mode(False), torch.no_grad():
        change(handle.model)
    after = handle.step(ours.fork(), torch.tensor([[5]]))
    assert (before - after).abs().max() > 1e-3
    is_followed = change is _new_data and handle.steps.recorder.follows_tensors
    assert write(handle, ours, theirs, ENOUGH) == (ENOUGH if is_followed else REPEATED + 1)


def test_weights_that_change_in_place_need_no_new_recording(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    with torch.inference_mode(False), torch.no_grad():
        handle.model.lm_head.weight.mul_(0.5)
    assert write(handle, ours, theirs, TURNS) == TURNS


def test_adapters_that_are_added_switched_and_merged():
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False}
    with torch.inference_mode(False):
        model = peft.get_peft_model(build("llama"), peft.LoraConfig(**lora), adapter_name="one").eval()
    with attach(model, POLICIES["lm-infinite"]) as handle:
        handle.steps.recorder = TraceRecorder()
        ours, theirs = read(handle)
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
        with torch.inference_mode(False):
            model.add_adapter("two", peft.LoraConfig(**lora))
            model.eval()
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
        model.set_adapter("two")
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
        with model.disable_adapter():
            assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("two", 3.0)
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
        with torch.inference_mode(False):
            model.merge_adapter()
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1


# --- what is not recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, policy",
    [
        ("llama", FullAttention()),
        ("llama", LMInfinite(window=W, sinks=G, ceiling=6)),
        ("llama", LMInfinite(window=W, sinks=G, ceiling=None)),
        ("llama", LMInfinite(window=W, sinks=G, top_k=2, top_k_layers=1)),
        ("gemma4_text", LMInfinite(window=W, sinks=G)),
        ("gemma3_text", LMInfinite(window=4, sinks=1)),  # its own windows, of 8, are not full yet
    ],
    ids=["full", "low ceiling", "no ceiling", "top_k", "shared layers", "local layers"],
)
def test_steps_that_are_not_static_are_not_recorded_whole(family, policy):
    length, count = (5, 3) if policy.span == 4 else (30, 12)
    with attach(build(family), policy) as handle:
        handle.steps.recorder = TraceRecorder()
        assert write(handle, *read(handle, length), count) == 0
        assert handle.steps.recorder.recorded == 0


def test_with_gradients_or_autocast_steps_run_eagerly(handle):
    with torch.autocast("cpu", torch.bfloat16):
        assert write(handle, *read(handle), 12) == 0
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    with torch.inference_mode(False):
        found = handle.step(ours, torch.tensor([[5]]))
    assert found.requires_grad


def test_a_cpu_records_once_enough_was_written():
    with attach(build("llama"), POLICIES["lm-infinite"]) as handle:
        ours, theirs = read(handle)
        write(handle, ours, theirs, CallTapes.eager_steps)
        assert ours.recorded.replay is None
        write(handle, ours, theirs, 2)
        assert ours.recorded.replay is not None


def test_recording_can_be_switched_off(handle):
    ours, theirs = read(handle)
    handle.steps.stop()
    assert write(handle, ours, theirs, CallTapes.eager_steps + 2) == 0
    assert ours.recorded is None and ours.recorded_open is None


# --- what fails ---------------------------------------------------------------------------------------


SOME_SLOT = torch.tensor([7])


def _baked_slot(monkeypatch):
    def put_there(memory, slot, keys, values):
        at = memory.slot(memory.seen)  # a number of Python's, as it is while recording
        memory.keys.narrow(2, at, 1).copy_(keys)
        memory.values.narrow(2, at, 1).copy_(values)

    def turn_and_put_there(*given):
        return turn_and_put(*given[:5], SOME_SLOT, *given[6:])

    monkeypatch.setattr(LayerMemory, "put_at", put_there)
    monkeypatch.setattr("everlong.attention.token_step.turn_and_put", turn_and_put_there)


def _nothing_put(monkeypatch):
    def turn_alone(*given):
        return turn_and_put(*given[:6], given[6].clone(), given[7].clone(), *given[8:])

    monkeypatch.setattr(LayerMemory, "put_at", lambda *_: None)
    monkeypatch.setattr("everlong.attention.token_step.turn_and_put", turn_alone)


def _baked_angles(monkeypatch):
    monkeypatch.setattr("everlong.attention.static_step._copy", lambda *_: None)


def _baked_tokens(monkeypatch):
    aim_at = StaticStep.aim_at

    def without_tokens(step, ids, found):
        aim_at(step, step.ids, found)

    monkeypatch.setattr(StaticStep, "aim_at", without_tokens)


MISTAKES = [_baked_slot, _nothing_put, _baked_angles, _baked_tokens]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_number_that_was_baked_in_makes_repeated_steps_wrong(handle, mistake, monkeypatch):
    """That the tests above would see it: without the check against an eager step, they fail."""
    monkeypatch.setattr(recording, "agree", lambda *_: True)
    mistake(monkeypatch)
    with pytest.raises(AssertionError, match="not close"):
        write(handle, *read(handle), ENOUGH)


@pytest.mark.thin
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_recording_that_differs_is_dropped_and_reported_once(handle, mistake, policy, monkeypatch):
    mistake(monkeypatch)
    ours, theirs = read(handle, policy=POLICIES[policy])
    with pytest.warns(UserWarning, match="step of writing was dropped.*something else") as reports:
        write(handle, ours, theirs, ENOUGH)
        write(handle, *read(handle), ENOUGH)
    assert len([report for report in reports if "dropped" in str(report.message)]) == 1
    assert ours.recorded is None and handle.steps.recorder is None
    assert handle.steps.open.recorder is None, "and no other way is tried"


class _Failing:
    eager_steps, follows_tensors, grows = TraceRecorder.eager_steps, False, False

    def __init__(self, fails_while):
        self.fails_while = fails_while

    def record(self, run):
        if self.fails_while == "recording":
            run()
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.replay, run()

    def replay(self):
        raise RuntimeError("no graph")


@pytest.mark.parametrize("when", ["recording", "repeating"])
def test_a_device_that_cannot_record_costs_a_warning(handle, when):
    handle.steps.recorder = _Failing(when)
    ours, theirs = read(handle)
    with pytest.warns(UserWarning, match="step of writing was dropped.*RuntimeError"):
        write(handle, ours, theirs, ENOUGH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(handle, ours, theirs, TURNS)


def test_a_model_whose_python_looks_at_tensors_is_not_recorded(handle):
    norm = handle.decoder.norm
    norm.forward = lambda x: type(norm).forward(norm, x) * (1.0 if float(x.sum()) > 0 else 0.5)
    on_a_cpu = isinstance(handle.steps.recorder, CallTapes)
    with nullcontext() if on_a_cpu else pytest.warns(UserWarning, match="writing was dropped.*captured"):
        write(handle, *read(handle), ENOUGH)
    assert handle.steps.recorder is None


def test_a_step_that_fails_while_it_is_repeated_leaves_the_cache_half_done(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    ours.recorded.replay = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        handle.step(ours, torch.tensor([[5]]))
    with pytest.raises(StateError, match="ended in an error"):
        handle.step(ours, torch.tensor([[5]]))


def test_refusals_are_those_of_an_eager_step(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    with pytest.raises(StateError, match="rows"):
        handle.step(ours, torch.tensor([[5], [6]]))
    handle.detach()
    with pytest.raises(StateError, match="detached"):
        handle.step(ours, torch.tensor([[5]]))
    with attach(handle.model, POLICIES["lm-infinite"]) as again:
        again.steps.recorder = TraceRecorder()
        write(again, *read(again), ENOUGH)
        with pytest.raises(StateError, match="attachment that has ended"):
            again.step(ours, torch.tensor([[5]]))


# --- memory, and devices ------------------------------------------------------------------------------


def test_a_recording_is_freed_with_its_cache(handle):
    ours, theirs = read(handle)
    write(handle, ours, theirs, ENOUGH)
    step, keys = weakref.ref(ours.recorded.step), weakref.ref(ours.memories[0].keys)
    gc.collect()
    gc.disable()
    try:
        del ours
        assert step() is None and keys() is None
    finally:
        gc.enable()


class _OneDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where something is done with, or makes, tensors of another device."""

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, output)):
            assert not isinstance(leaf, torch.Tensor) or leaf.device == self.device, f"{func}: {leaf}"
        self.count += 1
        return output


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt_oss"])  # bfloat16 there
def test_a_static_step_touches_no_other_device(family, policy):
    """What a capture would refuse, copies from and to the CPU, shown on a device that computes nothing."""
    with attach(build(family), POLICIES[policy]) as handle:
        handle.steps.recorder = TraceRecorder()
        ours, _ = read(handle)
        meta = torch.device("meta")
        with torch.inference_mode(False), torch.no_grad():
            handle.model.to(meta)
            for memory in ours.memories.values():
                for name in ("keys", "values", "sink_keys", "sink_values"):
                    if getattr(memory, name) is not None:
                        setattr(memory, name, getattr(memory, name).to(meta))
        found = aims(ours, handle._layers)
        step = StaticStep(ours, found)
        step.aim_at(torch.zeros(1, 1, dtype=torch.long, device=meta), found)
        with _OneDevice(meta) as watch:
            logits = handle.model(input_ids=step.ids, use_cache=True, **tiny.cached(step)).logits
        assert logits.device == meta and logits.shape == (1, 1, tiny.VOCAB)
        assert watch.count > 20


# --- adapters that streams bring along ----------------------------------------------------------------


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_each_stream_is_repeated_with_its_own_adapter(family, recorder):
    """In turn, and switched to another in between."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        attach(build(family), POLICIES["lm-infinite"]) as handle,
    ):
        load_adapters(handle, LORAS, family)
        handle.steps.recorder = RECORDERS[recorder]()
        pairs = []
        for name in (None, *LORAS):
            caches = [handle.new_cache() for _ in range(2)]
            for cache in caches:
                cache.adapter = name
                handle.model(tiny.random_ids(1, 30), **tiny.cached(cache))
            pairs.append(caches)
        for turn in range(ENOUGH):
            for caches in pairs:
                write(handle, *caches, 1, seed=turn)
        assert handle.steps.recorder.recorded == len(pairs)
        assert handle.steps.recorder.replayed == len(pairs) * (REPEATED + 1)
        ours, theirs = pairs[1]
        for cache in (ours, theirs):
            cache.adapter = "one layer"
        assert write(handle, ours, theirs, ENOUGH) == REPEATED + 1
