"""Layers that use another layer's keys (Gemma 4) keep none of their own."""

import dataclasses
import sys

import pytest
import torch

import tests.tiny as tiny
from everlong.attention import InfiniteHiP, LMInfinite, StreamingLLM, attach

ATTACH = sys.modules["everlong.attention.attach"]  # the package's name of that is the function

W, LENGTH = 12, 40
POLICIES = {
    "lm-infinite": LMInfinite(window=W, sinks=3),
    "streaming-llm": StreamingLLM(window=W, sinks=3),
    "top_k": LMInfinite(window=W, sinks=3, top_k=2, top_k_layers=1),
    "top_k in the sharing layers alone": LMInfinite(window=W, sinks=3, top_k=2, top_k_layers=3),
    "infinite-hip": InfiniteHiP(window=W, sinks=3, recalled=4, coarse=8, medium=4, block=2, group=4),
}
EDGES = {
    "one call": (0, LENGTH),
    "chunks": (0, 5, 11, 12, 13, 30, LENGTH),
    "token by token": tuple(range(LENGTH + 1)),
}


@pytest.fixture(scope="module")
def model():
    return tiny.build("gemma4_text")


@torch.no_grad()
def read(model, policy, edges, ids):
    with attach(model, policy) as handle:
        cache = handle.new_cache()
        pieces = [model(ids[:, a:b], **tiny.cached(cache)).logits for a, b in zip(edges, edges[1:])]  # noqa: B905
    return torch.cat(pieces, 1), cache


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("policy", POLICIES)
def test_sharing_is_the_same_as_a_copy_in_every_layer(model, policy, edges, monkeypatch):
    ids = tiny.random_ids(2, LENGTH)
    shared, cache = read(model, POLICIES[policy], EDGES[edges], ids)
    assert set(cache.memories) == {0, 1} and cache.kept == W
    dissect = ATTACH.dissect

    def without_donors(model):
        anatomy = dissect(model)
        assert [layer.donor for layer in anatomy.layers] == [None, None, 0, 1]
        layers = tuple(dataclasses.replace(layer, donor=None) for layer in anatomy.layers)
        return dataclasses.replace(anatomy, layers=layers)

    monkeypatch.setattr(ATTACH, "dissect", without_donors)
    copied, copies = read(model, POLICIES[policy], EDGES[edges], ids)
    assert set(copies.memories) == {0, 1, 2, 3}
    assert cache.bytes()["window"] < 0.6 * copies.bytes()["window"]
    torch.testing.assert_close(shared, copied, atol=1e-6, rtol=0)


@torch.no_grad()
def test_provisional_tokens_are_taken_back_from_layers_that_share(model):
    ids, guess = tiny.random_ids(1, LENGTH), tiny.random_ids(1, 6, seed=5)
    with attach(model, POLICIES["lm-infinite"]) as handle:
        cache = handle.new_cache()
        model(ids[:, :-1], **tiny.cached(cache))
        expected = model(ids[:, -1:], **tiny.cached(cache.fork())).logits
        with cache.provisional():
            model(guess, **tiny.cached(cache))
        cache.rollback()
        assert torch.equal(model(ids[:, -1:], **tiny.cached(cache)).logits, expected)


@torch.no_grad()
def test_a_saved_state_goes_on(model):
    ids = tiny.random_ids(1, LENGTH)
    with attach(model, POLICIES["top_k in the sharing layers alone"]) as handle:
        cache = handle.new_cache()
        model(ids[:, :-5], **tiny.cached(cache))
        restored = handle.restore_cache(*cache.state())
        logits = [model(ids[:, -5:], **tiny.cached(each)).logits for each in (cache, restored)]
    assert torch.equal(*logits)
