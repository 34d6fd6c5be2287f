"""Which kernels a recorded step takes, in layers of several forms."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

import tests.tiny as tiny
from everlong.attention import LMInfinite, attach
from everlong.kernels import loading
from everlong.kernels.calls import KernelFunction
from everlong.kernels.team import has_team
from everlong.models import lean_layers
from everlong.models.packing import pack
from tests.attention.trace_recorder import CountedTapes

pytestmark = pytest.mark.skipif(not (loading.wanted() and has_team()), reason="there are no kernels here")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
TAKEN = {  # a layer
    "llama": {"rms_norm": 2, "turn_and_put": 1, "attend": 1},
    "qwen2": {"rms_norm": 2, "turn_and_put": 1, "attend": 1},
    "qwen3": {"rms_norm": 4, "turn_and_put": 1, "attend": 1},
    "gemma3_text": {"rms_norm": 6, "turn_and_put": 1, "attend": 1},
    "gemma2": {"rms_norm": 4, "turn_and_put": 1},  # soft caps
    "gpt_neox": {},  # heads of queries, keys and values lie in turn
    "phi": {"turn_and_put": 1, "attend": 1},  # layers of another form
    "glm4": {},  # pairs interleaved
}


def counting(counted, method):
    def count(function, *args, **kwargs):
        counted[function.__name__] += 1
        return method(function, *args, **kwargs)

    return count


def taken(monkeypatch, model, rows=1, close=1e-4, pad=0):
    """Write until a step is recorded and repeated, hold it against an eager one, and count kernels."""
    counted = Counter()
    for name in ("repeated", "repeated_of"):
        monkeypatch.setattr(KernelFunction, name, counting(counted, getattr(KernelFunction, name)))
    with attach(model, LMInfinite(window=20, sinks=3)) as handle:
        recorder = handle.steps.recorder = CountedTapes()
        ours, theirs = (handle.new_cache() for _ in range(2))
        mask = torch.ones(rows, 30, dtype=torch.long)
        mask[1:, :pad] = 0
        for cache in (ours, theirs):
            model(tiny.random_ids(rows, 30), attention_mask=mask, **tiny.cached(cache))
        for token in tiny.random_ids(30, rows, seed=1):
            expected = model(token[:, None], **tiny.cached(theirs)).logits
            found = handle.step(ours, token[:, None])
            torch.testing.assert_close(found, expected, atol=close * float(expected.abs().max()), rtol=0)
        assert recorder.recorded == 1 and recorder.replayed > 20
    return dict(counted)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", TAKEN)
@torch.inference_mode()
def test_layers_of_several_forms_take_what_fits_them(family, rows, monkeypatch):
    with torch.inference_mode(False):
        model = tiny.build(family)
    layers = model.config.num_hidden_layers
    found = taken(monkeypatch, model, rows)
    expected = {name: count * layers for name, count in TAKEN[family].items()}
    assert found == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
@torch.inference_mode()
def test_rows_with_padding_take_them_once_their_windows_are_full(family, monkeypatch):
    """Padding stands where their sinks do, keys and values."""
    with torch.inference_mode(False):
        model = tiny.build(family)
    layers = model.config.num_hidden_layers
    found = taken(monkeypatch, model, rows=3, pad=9)
    assert found == {name: count * layers for name, count in TAKEN[family].items()}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_with_packed_weights_the_middle_of_the_mlp_is_one_call(kind, rows, monkeypatch):
    with torch.inference_mode(False):
        model = tiny.build("llama", **WIDE)
        pack(model, kind)
    found = taken(monkeypatch, model, rows, close=1e-2)
    assert found == {"rms_norm": 4, "turn_and_put": 2, "attend": 2, "gated": 2}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.inference_mode()
def test_models_of_other_numbers_are_pytorchs(dtype, monkeypatch):
    with torch.inference_mode(False):
        model = tiny.build("llama").to(dtype)
    assert taken(monkeypatch, model, close=1e-2) == {}


@pytest.mark.parametrize(
    ("activation", "form"),
    [
        (F.silu, (1.0, 0.0)),
        (lambda x: F.gelu(x, approximate="tanh"), (math.sqrt(8 / math.pi), 0.044715)),
        (F.gelu, None),
        (F.relu, None),
        (lambda x: x * torch.sigmoid(1.702 * x), None),
    ],
    ids=["silu", "gelu by tanh", "gelu", "relu", "quick gelu"],
)
def test_the_form_of_an_activation_is_found_by_what_it_gives(activation, form):
    assert lean_layers._form(activation) == form
