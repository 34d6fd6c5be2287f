"""Heads of many tokens rotated by a compiled kernel, as by plain operations."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import LMInfinite, attach
from everlong.errors import StateError
from everlong.kernels import loading
from everlong.kernels.direct import turn
from everlong.kernels.team import has_team
from everlong.models import rotary
from everlong.models.rotary import Frequencies, rotate

pytestmark = pytest.mark.skipif(not (loading.wanted() and has_team()), reason="there are no kernels here")


@pytest.fixture
def taken(monkeypatch):
    """One entry for each time that the kernel rotates; it is taken for few numbers, too."""
    seen = []
    assert rotary._is_right(), "asked once a process"

    def counted(*given):
        seen.append(1)
        return turn(*given)

    monkeypatch.setattr(rotary, "turn", counted)
    monkeypatch.setattr(rotary, "_LEAST", 0)
    return seen


def heads(rows, count, n, d, dtype=torch.float32):
    """Return heads as products leave them: those of a token behind one another, and more around them."""
    draws = torch.Generator().manual_seed(0)
    whole = torch.randn(rows, n + 3, count, d, generator=draws, dtype=dtype)
    return whole.transpose(1, 2)[:, :, 1 : n + 1]


def angles(positions, width, layout="halves", dtype=torch.float32):
    inverse = 1000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return Frequencies(inverse, 1.25).angles(positions, layout, torch.device("cpu"), dtype)


def true(x, cos, sin):
    width = cos.shape[-1]
    x, cos, sin = x.double(), cos.double(), sin.double()
    first, second = x[..., : width // 2], x[..., width // 2 : width]
    partners = torch.cat((second, first), -1)
    return torch.cat((x[..., :width] * cos + partners * sin, x[..., width:]), -1)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("d", "width"), [(64, 64), (80, 32), (16, 16), (96, 96)])
@pytest.mark.parametrize(
    "positions", [range(5, 75), 7, torch.arange(140).view(2, 70)], ids=["range", "one", "rows"]
)
def test_it_rotates_as_plain_operations(positions, d, width, threads, taken):
    x, (cos, sin) = heads(2, 3, 70, d), angles(positions, width)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = rotate(x, cos, sin, "halves")
    torch.set_num_threads(before)
    torch.testing.assert_close(found.double(), true(x, cos, sin), atol=1e-6, rtol=1e-6)
    assert taken == [1] and found.is_contiguous()


def test_a_step_is_recorded_without_it_and_repeats_what_it_rotates(taken):
    """Sinks of all layers are rotated at once, and are many enough; no tape could repeat the kernel."""
    model = tiny.build("llama", head_dim=64)
    ids, found = tiny.random_ids(2, 90), []
    with attach(model, LMInfinite(window=24, sinks=4)) as handle, torch.inference_mode():
        caches = [handle.new_cache() for _ in range(2)]
        for cache in caches:
            handle.model(ids[:, :30], **tiny.cached(cache))
        assert taken
        for at in range(30, 90):
            token = ids[:, at : at + 1]
            repeated = handle.step(caches[0], token)
            eager = handle.model(token, **tiny.cached(caches[1])).logits
            found.append((repeated.view(-1), eager.view(-1)))
        assert caches[0].recorded.replay is not None
    for repeated, eager in found:
        torch.testing.assert_close(repeated, eager, atol=1e-4, rtol=1e-4)


def test_what_it_does_not_take_is_pytorchs(taken):
    x = heads(1, 2, 9, 32)
    for layout, width in (("interleaved", 32), ("halves", 24)):
        rotate(x, *angles(range(9), width, layout), layout)
    rotate(x[:, :, :1], *angles(range(1), 32), "halves")
    rotate(x.double(), *angles(range(9), 32, dtype=torch.float64), "halves")
    rotate(x.bfloat16(), *angles(range(9), 32), "halves")
    rotate(x.mT.contiguous().mT, *angles(range(9), 32), "halves")
    assert not taken
    wanted = x.clone().requires_grad_()
    rotate(wanted, *angles(range(9), 32), "halves").sum().backward()
    assert wanted.grad is not None and not taken
    with torch.no_grad():
        rotate(wanted, *angles(range(9), 32), "halves")
    assert taken
    with pytest.raises(StateError, match="turn does not take"):
        turn(x, *angles(range(8), 32))


def test_few_numbers_are_left_to_pytorch(taken, monkeypatch):
    x, (cos, sin) = heads(1, 2, 9, 32), angles(range(9), 32)
    monkeypatch.setattr(rotary, "_LEAST", x.numel() + 1)
    rotate(x, cos, sin, "halves")
    assert not taken
    monkeypatch.setattr(rotary, "_LEAST", x.numel())
    rotate(x, cos, sin, "halves")
    assert taken


def test_a_kernel_that_is_wrong_is_left_with_a_warning(taken, monkeypatch):
    x, (cos, sin) = heads(1, 2, 9, 32), angles(range(9), 32)
    monkeypatch.setattr(rotary, "_is_right", rotary._is_right.__wrapped__)
    with monkeypatch.context() as context, pytest.warns(UserWarning, match="rotate wrongly"):
        context.setattr(rotary, "turn", lambda x, *_: torch.zeros_like(x))
        found = rotate(x, cos, sin, "halves")
    torch.testing.assert_close(found.double(), true(x, cos, sin), atol=1e-6, rtol=1e-6)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(rotate(x, cos, sin, "halves"), turn(x, cos, sin))
    finally:
        torch.set_default_dtype(torch.float32)
