"""Streams side by side give what one stock forward gives under a mask that says so."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from everlong.attention import FullAttention, attach
from everlong.attention.beside import beside
from everlong.errors import UnsupportedModelError, UnsupportedUseError
from tests import tiny
from tests.reference.outside import parallel_logits

_PLAIN = [
    *(
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "phi",
        "phi3",
        "glm4",
        "olmo2",
        "granite",
        "smollm3",
    ),
    *("stablelm", "starcoder2", "gpt_neox", "ministral3"),
]
LENGTHS = {"one": [14], "three": [9, 17, 5], "one token": [1, 12], "many": [6] * 6}


def read_apart(handle, shared, windows):
    begun = handle.new_cache()
    if shared:
        handle.model(torch.tensor([shared]), **tiny.cached(begun), use_cache=True)
    for window in windows:
        stream = begun.fork()
        handle.model(torch.tensor([window]), **tiny.cached(stream), use_cache=True)
        yield stream


def made(lengths, first=3, task=8):
    ids = tiny.random_ids(1, first + sum(lengths) + task)[0].tolist()
    at = first
    windows = []
    for length in lengths:
        windows.append(ids[at : at + length])
        at += length
    return ids[:first], windows, ids[at:]


def logits_of(handle, cache, task, edges):
    model = handle.model
    pieces = [
        model(torch.tensor([task[begin:end]]), **tiny.cached(cache), use_cache=True).logits[0]
        for begin, end in pairwise(edges)
    ]
    return torch.cat(pieces)


@pytest.mark.parametrize("family", _PLAIN)
@torch.no_grad()
def test_in_every_family_without_local_layers(family):
    model = tiny.build(family)
    model.set_attn_implementation("eager")
    # ministral3 scales its queries by position, from 64 on, where the number of tokens is, but no position.
    shared, windows, task = made([18, 30, 26])
    expected = parallel_logits(model, shared, windows, task)
    with attach(model, FullAttention()) as handle:
        joined = beside(read_apart(handle, shared, windows), len(shared), handle.layers)
        assert (joined.seen, joined.kept, joined.forgotten) == (77, 77, 0)
        ours = [logits_of(handle, joined.fork(), task, edges) for edges in ((0, 8), (0, 3, 4, 8), range(9))]
    for one in ours:
        assert torch.allclose(one, expected, atol=1e-4)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("first", [0, 1, 4])
@torch.no_grad()
def test_whatever_the_windows_and_what_they_share(lengths, first):
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    shared, windows, task = made(lengths, first)
    expected = parallel_logits(model, shared, windows, task)
    with attach(model, FullAttention()) as handle:
        joined = beside(read_apart(handle, shared, windows), first, handle.layers)
        assert torch.allclose(logits_of(handle, joined, task, (0, 1, 8)), expected, atol=1e-4)


@torch.no_grad()
def test_saved_and_reset_they_count_positions_as_they_did():
    model = tiny.build("ministral3")
    shared, windows, task = made([9, 17, 5])
    with attach(model, FullAttention()) as handle:
        cache = beside(read_apart(handle, shared, windows), len(shared), handle.layers)
        restored = handle.restore_cache(*cache.state())
        assert restored.folded == cache.folded > 0
        edges = (0, len(task))
        assert torch.equal(*(logits_of(handle, each, task, edges) for each in (restored, cache)))
        cache.reset()
        assert cache.folded == 0


@torch.no_grad()
def test_a_task_one_position_off_would_be_noticed():
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    shared, windows, task = made([9, 17, 5])
    expected = parallel_logits(model, shared, windows, task)
    with attach(model, FullAttention()) as handle:
        joined = beside(read_apart(handle, shared, windows), len(shared), handle.layers)
        for memory in joined.memories.values():
            memory.origin -= 1
        assert not torch.allclose(logits_of(handle, joined, task, (0, 8)), expected, atol=1e-2)


@torch.no_grad()
def test_tokens_can_be_taken_back_behind_them():
    model = tiny.build("llama")
    model.set_attn_implementation("eager")
    shared, windows, task = made([9, 17, 5])
    expected = parallel_logits(model, shared, windows, task)
    with attach(model, FullAttention()) as handle:
        joined = beside(read_apart(handle, shared, windows), len(shared), handle.layers)
        with joined.provisional():
            model(torch.tensor([[5, 6, 7]]), **tiny.cached(joined), use_cache=True)
        joined.rollback()
        assert torch.allclose(logits_of(handle, joined, task, (0, 2, 8)), expected, atol=1e-4)


@pytest.mark.parametrize("family", sorted(set(tiny.FAMILIES) - set(_PLAIN)))
def test_models_with_local_layers_are_refused(family):
    with (
        attach(tiny.build(family), FullAttention()) as handle,
        pytest.raises(UnsupportedModelError, match=r"layers of this model have a local window.*InfiniRetri"),
    ):
        beside([handle.new_cache()], 0, handle.layers)


def test_rotations_that_follow_the_length_are_refused():
    scaled = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}
    with (
        attach(tiny.build("llama", **scaled), FullAttention()) as handle,
        pytest.raises(UnsupportedUseError, match="rotation depends on the length"),
    ):
        beside([handle.new_cache()], 0, handle.layers)
