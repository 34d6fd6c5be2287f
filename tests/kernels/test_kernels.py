"""Compiled kernels against what they compute, written down in float64."""

import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch.nn import functional as F

from everlong.attention import compiled_keys, compiled_parts, compiled_standing
from everlong.attention.call_tape import CallTapes
from everlong.errors import StateError
from everlong.kernels import calls, loading
from everlong.kernels.calls import (
    Scratch,
    attends,
    fit,
    gated,
    rms_norm,
    token_fits,
    turn_and_put,
    window_fits,
)
from everlong.kernels.team import has_team
from everlong.models import rotary
from everlong.models.rotary import rotate

pytestmark = pytest.mark.skipif(not loading.wanted(), reason="Numba is not installed")
with_team = pytest.mark.skipif(not has_team(), reason="PyTorch's threads are not GNU's OpenMP")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def attend(query, keys, values, scaling, count=None):
    count = torch.tensor([keys.shape[2] if count is None else count])
    return calls.attend(query, keys, values, count, scaling, Scratch())


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def apart(rows, heads, d, seed, room):
    """Heads of one token a row, in memory that has other numbers between the rows."""
    return randn(rows, heads + room, 1, d, seed=seed)[:, :heads]


# --- norms, and the MLP's middle ---------------------------------------------------------------------


def norm(x, weight, eps, plus):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight.double() + plus)


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("d", [1, 7, 576, 2049])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_are_normed(rows, d, plus):
    x, weight = randn(rows, d) * 30, randn(d, seed=1)
    found = rms_norm(x, weight, 1e-3, plus, torch.float32)
    torch.testing.assert_close(found.double(), norm(x, weight, 1e-3, plus), atol=1e-5, rtol=1e-5)


def test_eps_is_added_to_the_mean_square():
    found = rms_norm(torch.full((1, 4), 1e-3), torch.ones(4), 1e-6, 0.0, torch.float32)
    torch.testing.assert_close(found, torch.full((1, 4), math.sqrt(0.5)))


def test_bfloat16_is_rounded_as_pytorch_rounds_it():
    x = randn(1, 4096) * 100
    ones, wide = torch.ones(4096), rms_norm(x, torch.ones(4096), 1e-5, 0.0, torch.float32)
    assert torch.equal(rms_norm(x, ones, 1e-5, 0.0, torch.bfloat16), wide.to(torch.bfloat16))
    halfway = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 0.0]])  # between two numbers
    scale = halfway.square().mean().rsqrt()
    exact = rms_norm(halfway, torch.ones(4) / scale, 0.0, 0.0, torch.float32)
    rounded = rms_norm(halfway, torch.ones(4) / scale, 0.0, 0.0, torch.bfloat16)
    assert torch.equal(rounded, exact.to(torch.bfloat16))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_a_number_stays_that(bad):
    x = randn(2, 8)
    x[1, 3] = bad
    for dtype in (torch.float32, torch.bfloat16):
        found = rms_norm(x, torch.ones(8), 1e-5, 0.0, dtype)
        assert found[0].isfinite().all() and found[1, 3].isnan()
    gates = torch.full((1, 4), bad, dtype=torch.bfloat16)
    assert not gated(gates, 1.0, 0.0).isfinite().any()


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_the_middle_of_the_mlp_is_silu_or_gelu_times_what_it_gates(scale):
    given = (randn(3, 2 * 96) * scale).to(torch.bfloat16)
    gate, up = given.double().chunk(2, -1)
    for form, activation in (
        ((1.0, 0.0), F.silu),
        ((math.sqrt(8 / math.pi), 0.044715), lambda x: F.gelu(x, approximate="tanh")),
    ):
        found, expected = gated(given, *form).double(), activation(gate) * up
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=2.0**-8)


# --- a token's place in the window -------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("slot", [3, 10, 15])
@pytest.mark.parametrize("is_kept_raw", [False, True], ids=["", "raw"])
def test_a_token_is_rotated_and_put_into_its_slot(is_kept_raw, slot, rows, sinks, width):
    heads, kv_heads, d, slots = 6, 2, 8, 16
    query, key, value = (
        apart(rows, heads, d, 1, 4),
        apart(rows, kv_heads, d, 2, 8),
        apart(rows, kv_heads, d, 3, 1),
    )
    angle = randn(1, width // 2, seed=4)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    keys, values = (randn(rows, kv_heads, slots + 5, d, seed=seed)[:, :, :slots] for seed in (5, 6))
    assert window_fits(keys, values)
    held = randn(rows, kv_heads, sinks, d, seed=7) if sinks else None
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, :, slot : slot + 1] = rotate(key, cos, sin, "halves")
    expected_values[:, :, slot : slot + 1] = value
    if held is not None:
        expected_keys[:, :, :sinks] = held
    raw = randn(rows, kv_heads, slots + 5, d, seed=8)[:, :, :slots]
    expected_raw = raw.clone()
    expected_raw[:, :, slot : slot + 1] = key
    given = (
        query,
        key,
        value,
        cos,
        sin,
        torch.tensor([slot]),
        keys,
        values,
        held,
        raw if is_kept_raw else None,
    )
    for ours, theirs in (
        (turn_and_put(*given), rotate(query, cos, sin, "halves")),
        (keys, expected_keys),
        (values, expected_values),
        *([(raw, expected_raw)] if is_kept_raw else []),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


# --- attention ---------------------------------------------------------------------------------------


def one_softmax(query, keys, values, scaling):
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(groups, 1) for x in (keys, values))
    return (query.double() @ keys.transpose(-1, -2) * scaling).softmax(-1) @ values


@with_team
@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("m", [1, 3, 127, 128, 130, 1000, 2048])
@pytest.mark.parametrize(("heads", "d"), [((9, 3), 64), ((4, 1), 256), ((4, 4), 6), ((7, 7), 33)])
def test_it_is_one_softmax_in_however_many_threads(heads, d, m, room, threads):
    for rows in (1, 3):
        query = randn(rows, heads[0], 1, d) * 3
        keys, values = (randn(rows, heads[1], m + room, d, seed=seed)[:, :, :m] for seed in (1, 2))
        assert attends(query, keys, values)
        found = attend(query, keys, values, 0.3)
        expected = one_softmax(query, keys, values, 0.3)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


@with_team
@pytest.mark.parametrize("heads", [(9, 3), (2, 2)])
def test_of_a_window_the_first_slots_are_seen_as_many_as_stand_in_a_tensor(heads, threads):
    query, count = randn(2, heads[0], 1, 16) * 3, torch.tensor([0])
    keys, values = (randn(2, heads[1], 700, 16, seed=seed) for seed in (1, 2))
    out = torch.empty_like(query)
    again = calls.attend.repeated(query, keys, values, count, 0.3, Scratch(), out=out)
    for seen in (1, 127, 128, 129, 500, 640, 700):
        keys[:, :, seen:] = math.nan
        count.fill_(seen)
        again()
        expected = one_softmax(query, keys[:, :, :seen], values[:, :, :seen], 0.3)
        torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
        keys[:, :, seen:] = randn(2, heads[1], 700 - seen, 16, seed=3)


@with_team
def test_large_logits_do_not_overflow_and_what_is_not_a_number_shows():
    query, keys, values = randn(1, 2, 1, 8), randn(1, 1, 300, 8), randn(1, 1, 300, 8)
    found = attend(query * 1e4, keys, values, 1.0)
    torch.testing.assert_close(
        found.double(), one_softmax(query * 1e4, keys, values, 1.0), atol=1e-5, rtol=1e-4
    )
    keys[0, 0, 7, 2] = math.nan
    assert attend(query, keys, values, 1.0).isnan().all()


def test_what_does_not_lie_as_the_kernels_take_it_is_left_to_pytorch():
    query, window = randn(1, 4, 1, 8), randn(1, 2, 16, 8)
    assert fit(query) and window_fits(window, window.clone())
    assert not fit(query.double()) and not fit(randn(4, 8).T)
    assert not window_fits(window, window.transpose(2, 3).contiguous().transpose(2, 3))
    assert not window_fits(window.to(torch.bfloat16), window.to(torch.bfloat16))
    assert not window_fits(*[randn(2, 3, 16, 8)[:, :2]] * 2)
    assert not window_fits(window, randn(1, 2, 16, 6)) and not window_fits(*[window[:, :, :0]] * 2)
    assert not attends(randn(1, 4, 2, 8), window, window) and not attends(randn(1, 3, 1, 8), window, window)
    assert not attends(randn(2, 4, 1, 8), window, window) and not attends(randn(1, 4, 1, 6), window, window)
    token = randn(1, 2, 1, 8)
    assert token_fits(query, token, token, window)
    assert not token_fits(query, token, randn(1, 2, 1, 6), window)
    assert not token_fits(query, token.double(), token, window)
    assert not token_fits(query, randn(1, 2, 2, 8), randn(1, 2, 2, 8), window)


def test_what_a_kernel_does_not_take_is_refused_before_an_address_is_used():
    window, scratch = randn(1, 2, 16, 8), Scratch()
    with pytest.raises(StateError, match="attend does not take"):
        calls.attend(randn(1, 4, 1, 6), window, window, torch.tensor([16]), 1.0, scratch)
    with pytest.raises(StateError, match="attend does not take"):
        calls.attend(randn(1, 4, 1, 8), window, window, torch.tensor(16), 1.0, scratch)
    with pytest.raises(StateError, match="rms_norm"):
        rms_norm(randn(2, 8), randn(7), 1e-5, 0.0, torch.float32)
    with pytest.raises(StateError, match="rms_norm"):
        rms_norm(randn(2, 8), randn(8), 1e-5, 0.0, torch.float16)
    with pytest.raises(StateError, match="gated"):
        gated(randn(2, 8), 1.0, 0.0)
    token, angles, slot = randn(1, 2, 1, 8), torch.ones(1, 8), torch.tensor([3])
    with pytest.raises(StateError, match="turn_and_put"):
        turn_and_put(token, token, token, angles, angles, slot, window, window, randn(1, 1, 3, 8), None)
    with pytest.raises(StateError, match="turn_and_put"):
        turn_and_put(token, token, token, angles, angles, slot.int(), window, window, None, None)
    with pytest.raises(StateError, match="turn_and_put"):
        turn_and_put(token, token, token, angles, angles, slot, window, window, None, randn(1, 2, 15, 8))


@with_team
def test_memory_does_not_follow_the_default_dtype():
    query, window = randn(1, 4, 1, 8), randn(1, 2, 300, 8)
    expected = attend(query, window, window, 1.0)
    torch.set_default_dtype(torch.float64)
    try:
        found = attend(query, window, window, 1.0)
        assert found.dtype == torch.float32 and torch.equal(found, expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_row_of_zeros_is_divided_by_as_pytorch_divides():
    weight = torch.ones(8)
    assert rms_norm(torch.zeros(1, 8), weight, 0.0, 0.0, torch.float32).isnan().all()
    assert torch.equal(rms_norm(torch.zeros(1, 8), weight, 1e-5, 0.0, torch.float32), torch.zeros(1, 8))


# --- on a tape ---------------------------------------------------------------------------------------


@with_team
def test_a_tape_repeats_kernels_on_other_numbers():
    weight, keys, values = randn(8, seed=1), randn(1, 1, 16, 8, seed=2), randn(1, 1, 16, 8, seed=3)
    cos, sin, slot = torch.ones(1, 8), torch.zeros(1, 8), torch.tensor([4])

    def step(x):
        heads = rms_norm(x, weight, 1e-5, 0.0, torch.float32).view(1, 2, 1, 8)
        query = turn_and_put(heads, heads[:, :1], heads[:, 1:], cos, sin, slot, keys, values, None, None)
        return calls.attend(query, keys, values, count, 1.0, scratch).view(2, 8) * 2

    given, scratch, count = randn(2, 8), Scratch(), torch.tensor([16])
    replay, result = CallTapes().record(lambda: step(given))
    del scratch  # a recording holds on to what it uses
    scratch = Scratch()
    for seed in (5, 6, 7):
        given.copy_(randn(2, 8, seed=seed))
        slot.fill_(seed)
        replay()
        found, kept = result.clone(), (keys.clone(), values.clone())
        torch.testing.assert_close(found, step(given))
        assert torch.equal(kept[0], keys) and torch.equal(kept[1], values)


@with_team
@pytest.mark.parametrize("later", [1, 2, 5])
@torch.inference_mode()
def test_threads_may_become_more_or_fewer_after_a_recording(later):
    query, window, scratch = randn(1, 4, 1, 8), randn(1, 2, 1000, 8), Scratch()
    count = torch.tensor([1000])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        replay, result = CallTapes().record(
            lambda: calls.attend(query, window, window, count, 1.0, scratch) + 0
        )
        expected = result.clone()
        torch.set_num_threads(later)
        result.zero_()
        replay()
        torch.testing.assert_close(result, expected)
    finally:
        torch.set_num_threads(before)


@with_team
def test_two_threads_may_repeat_two_recordings():
    found = []

    @torch.inference_mode()
    def write(seed):
        query, window, scratch = randn(1, 4, 1, 8, seed=seed), randn(1, 2, 1000, 8, seed=seed), Scratch()
        count = torch.tensor([1000])
        replay, result = CallTapes().record(
            lambda: calls.attend(query, window, window, count, 1.0, scratch) + 0
        )
        expected = one_softmax(query, window, window, 1.0).float()
        for _ in range(200):
            result.zero_()
            replay()
            found.append(torch.allclose(result, expected, atol=1e-5))

    threads = [Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 400 and all(found)


def test_a_product_that_is_made_anew_is_handed_on_to_a_kernel():
    numbers, scales = torch.randint(-127, 127, (64, 32), dtype=torch.int8), torch.ones(64).bfloat16() / 100

    def step(x):
        return gated(torch._weight_int8pack_mm(x.bfloat16(), numbers, scales), 1.0, 0.0).float() * 2

    given = randn(2, 32)
    replay, result = CallTapes().record(lambda: step(given))
    for seed in (1, 2, 3):
        given.copy_(randn(2, 32, seed=seed))
        replay()
        assert torch.equal(result, step(given))


def test_a_recording_holds_on_to_the_memory_of_weights_that_are_moved():
    weight = torch.nn.Parameter(torch.ones(8), requires_grad=False)
    given = randn(1, 8)
    replay, result = CallTapes().record(lambda: rms_norm(given, weight, 1e-5, 0.0, torch.float32) * 1)
    expected = result.clone()
    weight.data = torch.full((8,), 7.0)
    others = [torch.full((8,), float(i)) for i in range(100)]  # would take the place of what was freed
    replay()
    assert torch.equal(result, expected) and len(others) == 100


def test_kernels_are_taken_in_recordings_alone():
    assert not loading.in_use()
    with loading.recording():
        assert loading.in_use()
    assert not loading.in_use()


def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(loading.SWITCH, "0")
    assert not loading.wanted.__wrapped__()
    monkeypatch.setenv(loading.SWITCH, "1")
    assert loading.wanted.__wrapped__()


@pytest.fixture
def compiler_fails(monkeypatch):
    def fail(name):
        raise ImportError("no such processor")

    monkeypatch.setattr(loading, "import_module", fail)
    loading.compiled.cache_clear()
    yield
    loading.compiled.cache_clear()


def test_a_compiler_that_fails_costs_a_warning_and_nothing_else(compiler_fails):
    with loading.recording(), pytest.warns(UserWarning, match="no such processor"):
        assert not loading.in_use()


@pytest.mark.parametrize(
    "is_right",
    [
        *(module._is_right for module in (compiled_keys, compiled_parts, compiled_standing, rotary)),
        compiled_parts._is_right_for_many,
    ],
)
def test_nothing_is_believed_of_a_compiler_that_fails(is_right, compiler_fails):
    with pytest.warns(UserWarning, match="no such processor"):
        assert not is_right.__wrapped__()


def test_a_lesser_processor_no_folder_to_write_to_and_no_team_are_as_good():
    """Vectors are narrower there, and what multiplies and adds is two instructions."""
    code = """
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []
import torch
from everlong.attention import compiled_keys, compiled_parts, compiled_standing
from everlong.kernels import team
from everlong.kernels.calls import attends, rms_norm
from everlong.kernels.compiling import HAS_WIDE_VECTORS
from everlong.models import rotary
assert not HAS_WIDE_VECTORS
asked = compiled_keys, compiled_parts, compiled_standing, rotary
assert all(module._is_right() for module in asked) and compiled_parts._is_right_for_many()
team._candidates = lambda: iter(())
team._openmp.cache_clear()
x, window = torch.randn(1, 8), torch.randn(1, 2, 16, 8)
assert not attends(torch.randn(1, 4, 1, 8), window, window)
found = rms_norm(x, torch.ones(8), 1e-5, 0.0, torch.float32)
assert torch.allclose(found, torch.nn.functional.rms_norm(x, [8], eps=1e-5), atol=1e-6)
"""
    lesser = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], env=lesser, check=True)


@pytest.mark.parametrize("name", ["attending", "compiled", "looking", "turning"])
def test_kernels_name_what_they_are_made_of(name):
    """Numba looks at a kernel's own file alone to know whether what it keeps is outdated."""
    folder = Path(loading.__file__).parent
    others = b"".join((folder / other).read_bytes() for other in ("compiling.py", "tiles.py"))
    made_of = hashlib.sha256(others).hexdigest()[:16]
    assert f'_MADE_OF = "{made_of}"' in (folder / f"{name}.py").read_text()
