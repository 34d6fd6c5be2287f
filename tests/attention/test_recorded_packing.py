"""Weights that are packed anew are seen by steps that were recorded with the former ones."""

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import LMInfinite, attach
from everlong.kernels.loading import compiled
from everlong.models.packing import pack
from tests.attention.trace_recorder import RECORDERS, CountedTapes

WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
STEPS = 12


def write(handle, ours, theirs, seed):
    """Write the same on both, and return how many steps were repeated."""
    recorder = handle.steps.recorder
    takes_kernels = type(recorder) is CountedTapes and compiled() is not None
    close = 1e-2 if takes_kernels else 1e-5  # kernels may round to another bfloat16 number
    before = recorder.replayed
    for token in tiny.random_ids(STEPS, 1, seed=seed):
        expected = handle.model(token[None], **tiny.cached(theirs)).logits
        found = handle.step(ours, token[None])
        torch.testing.assert_close(found, expected, atol=close * float(expected.abs().max()), rtol=0)
    return recorder.replayed - before


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.inference_mode()
def test_weights_that_are_packed_anew_are_recorded_anew(kind, recorder):
    with torch.inference_mode(False):
        model = tiny.build("llama", **WIDE)
        packing = pack(model, kind)
    with attach(model, LMInfinite(window=20, sinks=3)) as handle:
        handle.steps.recorder = RECORDERS[recorder]()
        caches = [handle.new_cache() for _ in range(2)]
        for cache in caches:
            handle.model(tiny.random_ids(1, 30), **tiny.cached(cache))
        assert write(handle, *caches, seed=1) > 0
        packing.undo()
        with torch.inference_mode(False), torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(3)
            pack(model, kind)
        assert 0 < write(handle, *caches, seed=2) < STEPS
        assert handle.steps.recorder.recorded == 2
