"""Streams that begin with keys that no forward made: under which policies they cannot."""

from __future__ import annotations

import pytest
import torch

from everlong.attention import DualChunk, FullAttention, LinearScaling, YaRN, attach
from everlong.errors import UnsupportedUseError
from tests import tiny


@pytest.fixture
def handle():
    with attach(tiny.build("llama"), FullAttention()) as handle:
        yield handle


def prefix_of(handle, *, is_trained=False):
    cache = handle.new_cache()
    with torch.no_grad():
        handle.model(tiny.random_ids(1, 6), **tiny.cached(cache), use_cache=True)
    return {
        number: (memory.keys[:, :, :6].clone().requires_grad_(is_trained), memory.values[:, :, :6].clone())
        for number, memory in cache.memories.items()
    }


@pytest.mark.parametrize("policy", [YaRN(factor=2), LinearScaling(factor=2)], ids=repr)
def test_another_table_than_the_keys_is_refused(handle, policy):
    with pytest.raises(UnsupportedUseError, match="another table.*such as LMInfinite"):
        handle.new_cache(policy, prefix=prefix_of(handle))


def test_keys_that_are_placed_otherwise_are_not_trained(handle):
    policy = DualChunk(chunk=4, positions=16)
    assert handle.new_cache(policy, prefix=prefix_of(handle)).seen == 6
    with pytest.raises(UnsupportedUseError, match="cannot be trained under DualChunk"):
        handle.new_cache(policy, prefix=prefix_of(handle, is_trained=True))
