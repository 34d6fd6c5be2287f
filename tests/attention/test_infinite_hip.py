"""InfiniteHiP's three stages: in a longer text, how often each asks, and how little they look at."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest

import tests.tiny as tiny
from everlong.attention import InfiniteHiP, Tier, attach, infinite_hip
from tests.attention.test_exactness import model_of
from tests.attention.test_recalled import EXACT, off, read, spec_of
from tests.reference.model import reference_logits
from tests.ties import on_one_stream

LENGTH, PREFILL = 100, 73
POLICY = InfiniteHiP(
    window=14,
    sinks=1,
    recalled=2,
    coarse=8,
    medium=2,
    block=1,
    group=16,
    coarse_steps=6,
    medium_steps=4,
    block_steps=2,
)
CHUNKS = (0, PREFILL, *range(PREFILL + 1, LENGTH + 1))
EDGES = (0, 14, *range(16, PREFILL, 16), *range(PREFILL, LENGTH))


@functools.cache
def ids():
    return tiny.random_ids(1, LENGTH)


def logits_under(policy, tier=EXACT, model="grouped heads", some=None):
    with attach(model_of(model), policy, tier=tier) as handle:
        return read(model_of(model), handle.new_cache(), ids() if some is None else some, CHUNKS)


@pytest.mark.parametrize("model", ["grouped heads", "partial rotary"])
def test_equals_the_reference_where_every_stage_has_a_choice(model):
    def check(seed):
        some = tiny.random_ids(1, LENGTH, seed=seed)
        theirs = reference_logits(model_of(model), some, spec_of(POLICY), edges=EDGES)
        assert off(logits_under(POLICY, model=model, some=some), theirs) < 1e-5

    on_one_stream(check)


@pytest.mark.parametrize(
    "change",
    [
        *({"coarse": size} for size in (4, 16)),
        *({"medium": size} for size in (1, 4)),
        {"medium": 2, "block": 2},
        *({"coarse_steps": steps} for steps in (5, 7)),
        *({"medium_steps": steps} for steps in (3, 5)),
        *({"block_steps": steps} for steps in (1, 3)),
    ],
    ids=str,
)
def test_every_constant_shows(change):
    assert off(logits_under(dataclasses.replace(POLICY, **change)), right()) > 1e-4


@functools.cache
def right():
    return logits_under(POLICY)


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_rounded_tier_is_searched_as_it_is(precision, monkeypatch):
    """Segments that are whole are searched in bytes, so some choices differ, and none is lost."""
    monkeypatch.setattr("everlong.attention.key_index.SEGMENT", 64)
    ours = logits_under(POLICY, Tier(precision=precision))
    assert 0 < off(ours, right()) < 1.5
    assert off(ours[:, :14], right()[:, :14]) < 1e-5


def asked_stages(monkeypatch):
    """Return a list to which every stage that asks adds its number."""
    asked, best = [], infinite_hip._Search.best

    def noted(self, stage, within):
        asked.append(stage)
        return best(self, stage, within)

    monkeypatch.setattr(infinite_hip._Search, "best", noted)
    return asked


def test_each_stage_asks_as_often_as_it_is_to(monkeypatch):
    asked = asked_stages(monkeypatch)
    model = model_of("grouped heads")
    with attach(model, POLICY, tier=EXACT) as handle:
        cache = handle.new_cache()
        read(model, cache, ids(), (0, PREFILL))
        layers = len(cache.memories)
        found = []
        for at in range(PREFILL, PREFILL + 14):
            asked.clear()
            read(model, cache, ids(), (at, at + 1))
            found.append(asked[: len(asked) // layers])
        every, last = [0, 1, 2], [2]
        assert found[:7] == [every, [], last, [], [1, 2], [], every]
        assert found[7:] == [[], [1, 2], [], last, [], every, []]


def test_a_group_in_between_begins_anew(monkeypatch):
    asked = asked_stages(monkeypatch)
    model = model_of("grouped heads")
    with attach(model, POLICY, tier=EXACT) as handle:
        cache = handle.new_cache()
        read(model, cache, ids(), (0, PREFILL, PREFILL + 1, PREFILL + 5))
        asked.clear()
        read(model, cache, ids(), (PREFILL + 5, PREFILL + 6))
    assert asked[:3] == [0, 1, 2]


def test_when_the_tier_has_lost_tokens_all_stages_ask_anew(monkeypatch):
    monkeypatch.setattr("everlong.attention.tiers.BLOCK", 4)
    asked = asked_stages(monkeypatch)
    model = model_of("grouped heads")
    with attach(model, POLICY, tier=EXACT) as handle:
        cache = handle.new_cache()
        read(model, cache, ids(), (0, PREFILL, PREFILL + 1))
        asked.clear()
        for memory in cache.memories.values():
            memory.tier._give_up(3)
        read(model, cache, ids(), (PREFILL + 1, PREFILL + 2))
        gone = next(iter(cache.memories.values())).tier.first
    assert gone == 12 and asked[:3] == [0, 1, 2]


def test_few_keys_are_looked_at(monkeypatch):
    """Of each chunk one, and one for each time it is halved, in each head; none where all are recalled."""
    looked, keys_at = [], infinite_hip.keys_at

    def noted(tokens, row, view):
        looked.append(tokens.shape[1])
        return keys_at(tokens, row, view)

    monkeypatch.setattr(infinite_hip, "keys_at", noted)
    model = model_of("grouped heads")
    with attach(model, POLICY, tier=EXACT) as handle:
        cache = handle.new_cache()
        read(model, cache, ids(), (0, PREFILL))
        looked.clear()
        read(model, cache, ids(), (PREFILL, PREFILL + 1))
        layers = len(cache.memories)
        far = PREFILL + 1 - 1 - 11
        of_stage = [far // 8, 4 * 4 + far % 8 // 2, 4 * 2 + 1]
        most = sum(
            chunks * (1 + int(math.log2(size))) for chunks, size in zip(of_stage, (8, 2, 1), strict=True)
        )
        assert 0 < sum(looked) <= layers * most
    roomy = dataclasses.replace(POLICY, window=LENGTH - 1, recalled=90, block=2)
    looked.clear()
    logits_under(roomy)
    assert not looked
