"""Keys in bytes: their products are those of the keys, in all segments, for copies, rows and what is left."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

import everlong.attention.key_index as key_index
from everlong.attention import Tier, compiled_keys
from everlong.attention.block_maxima import BlockMaxima
from everlong.attention.key_index import KeyIndex
from everlong.attention.tiers import BLOCK, BlockStore
from everlong.kernels import loading
from everlong.kernels.direct import look
from everlong.kernels.team import has_team
from everlong.kernels.tiles import codes_at, in_tiles, out_of_tiles

ROWS, HEADS, SIZE = 2, 3, 8


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(key_index, "SEGMENT", 2 * BLOCK)


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """With the compiled kernel, where there is one, however few keys; and without."""
    monkeypatch.setattr(compiled_keys, "_LEAST", 0)
    if request.param == "plain":
        monkeypatch.setattr(compiled_keys, "wanted", lambda: False)
    return request.param == "compiled" and loading.wanted() and has_team()


def keys_of(count, seed=0):
    """Return keys as models have them: some channels far from 0, some large."""
    draws = torch.Generator().manual_seed(seed)
    keys = torch.randn(ROWS, HEADS, count, SIZE, generator=draws)
    keys[..., 1] += 20
    keys[..., 2] *= 10
    return keys


def asked_of(seed=1):
    return torch.randn(HEADS, 5, SIZE, generator=torch.Generator().manual_seed(seed))


def looked_up(held, row, asked, begin, stop, block=1):
    """Return the best of what is asked of an index or a tier, shape (heads, c, blocks)."""
    best = BlockMaxima(asked, begin, stop, block)
    held.look(row, best)
    return best.found


def true_products(keys, row, asked, begin=0, stop=None):
    return torch.einsum("hnd,hcd->hcn", keys[row, :, begin:stop].double(), asked.double())


def most_off(keys, asked):
    """How far products of rounded numbers can be off, where channels have their own scales."""
    spread = (keys - keys.mean(2, keepdim=True)).abs().amax((0, 2))
    scaled = (asked * spread[:, None]).abs()
    return float((scaled.sum(2) / 127 / 2).max() + scaled.amax() / 127 / 2 * SIZE) * 1.01


@pytest.mark.parametrize("is_exact", [True, False])
def test_products_are_those_of_the_keys(is_exact, kernels, monkeypatch):
    taken = []
    monkeypatch.setattr(key_index, "look", lambda *given, **rest: taken.append(1) or look(*given, **rest))
    keys, asked = keys_of(5 * BLOCK + 7), asked_of()
    index = KeyIndex(is_exact=is_exact)
    for begin, stop in ((0, 1), (1, BLOCK), (BLOCK, 4 * BLOCK + 3), (4 * BLOCK + 3, keys.shape[2])):
        index.append(keys[:, :, begin:stop])
    for row in range(ROWS):
        for begin, stop in ((0, keys.shape[2]), (3, 5), (BLOCK, 3 * BLOCK), (4 * BLOCK, 4 * BLOCK + 9)):
            off = looked_up(index, row, asked, begin, stop) - true_products(keys, row, asked, begin, stop)
            assert off.shape == (HEADS, 5, stop - begin)
            assert off.abs().max() < (1e-4 if is_exact else most_off(keys, asked))
    assert len(taken) == (3 * ROWS if kernels else 0), "not where all asked for are behind the segments"


def test_the_latest_keys_are_as_they_came():
    keys, asked = keys_of(3 * BLOCK), asked_of()
    index = KeyIndex()
    index.append(keys)
    off = looked_up(index, 1, asked, 2 * BLOCK, 3 * BLOCK) - true_products(keys, 1, asked, 2 * BLOCK)
    assert off.abs().max() < 1e-4


def test_what_keys_have_in_common_costs_no_precision():
    keys, asked, index = keys_of(2 * BLOCK) + 1000, asked_of(), KeyIndex()
    index.append(keys)
    off = looked_up(index, 0, asked, 0, 2 * BLOCK) - true_products(keys, 0, asked)
    assert off.abs().max() < most_off(keys, asked) + 0.02  # float32 of some thousands


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_bytes_are_multiplied_exactly(count):
    draws = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (2, 70, 1024), dtype=torch.int8, generator=draws)
    asked = torch.randint(-127, 128, (2, count, 1024), dtype=torch.int8, generator=draws)
    asked[1, -1, :500] = codes[1, 3, :500] = 127
    true = asked.long() @ codes.long().mT
    assert torch.equal(key_index._whole_products(asked, codes).long(), true)


@pytest.mark.parametrize("kernels", ["AVX2", "DEFAULT"])
def test_where_kernels_clip_products_of_bytes_others_are_used(kernels):
    script = """
import torch
from everlong.attention import key_index
draws = torch.Generator().manual_seed(0)
asked, codes = (torch.randint(-127, 128, (2, n, 64), dtype=torch.int8, generator=draws) for n in (3, 90))
assert torch.equal(key_index._whole_products(asked, codes).long(), asked.long() @ codes.long().mT)
"""
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": kernels}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


@pytest.mark.parametrize("is_exact", [True, False])
@pytest.mark.parametrize("first", [0, 5, 3 * BLOCK])
def test_single_keys_are_those_that_came_each_head_its_own(is_exact, first):
    keys = keys_of(5 * BLOCK + 7)
    index = KeyIndex(first, is_exact=is_exact)
    index.append(keys)
    draws = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, keys.shape[2], (HEADS, 90), generator=draws)
    heads = torch.arange(HEADS)[:, None]
    spread = keys.amax(2) - keys.amin(2)
    for row in range(ROWS):
        off = (index.keys_at(row, tokens + first) - keys[row, heads, tokens]).abs()
        assert off.shape == (HEADS, 90, SIZE)
        most = 0 if is_exact else spread[row][:, None] / 127 / 2 * 1.01  # half a step, of the larger side
        assert (off <= most + 1e-5).all()
        assert (off[tokens + first >= (first + keys.shape[2]) // (2 * BLOCK) * 2 * BLOCK] == 0).all()


@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 32), (31, 1), (7, 20), (5, 300)])
@pytest.mark.parametrize("d", [1, 7, 64])
def test_tiles_are_taken_apart_into_what_was_laid_in_them(first, count, d):
    codes = torch.randint(-127, 128, (2, 3, count, d), generator=torch.Generator().manual_seed(0)).to(
        torch.int8
    )
    tiles = in_tiles(codes, first)
    assert torch.equal(out_of_tiles(tiles, first, count, d), codes)
    heads, tokens = torch.tensor([2, 0, 1]), torch.tensor([0, count - 1, count // 2])
    assert torch.equal(codes_at(tiles[1], first, heads, tokens + first, d), codes[1][heads, tokens])


def test_single_keys_are_what_products_are_of():
    keys, index, asked = keys_of(4 * BLOCK + 3), KeyIndex(), asked_of()
    index.append(keys)
    tokens = torch.arange(keys.shape[2]).expand(HEADS, -1)
    found = torch.einsum("hnd,hcd->hcn", index.keys_at(0, tokens), asked)
    assert (found - looked_up(index, 0, asked, 0, keys.shape[2])).abs().max() < 2 * most_off(keys, asked)


def test_a_copy_goes_its_own_way():
    index = KeyIndex()
    index.append(keys_of(3 * BLOCK))
    twin = copy.deepcopy(index)
    index.append(keys_of(3 * BLOCK, seed=5))
    twin.append(keys_of(3 * BLOCK, seed=6))
    asked = asked_of()
    first, second = (looked_up(each, 0, asked, 3 * BLOCK, 6 * BLOCK) for each in (index, twin))
    for found, seed in ((first, 5), (second, 6)):
        keys = keys_of(3 * BLOCK, seed)
        assert (found - true_products(keys, 0, asked)).abs().max() < 2 * most_off(keys, asked)
    assert torch.equal(looked_up(index, 0, asked, 0, 2 * BLOCK), looked_up(twin, 0, asked, 0, 2 * BLOCK))
    assert index._segments[0] is twin._segments[0], "what does not change is shared"


@pytest.mark.parametrize("precision", ["float16", "int8", "exact"])
@pytest.mark.parametrize("asked_first", [True, False])
def test_a_tier_tells_products_of_all_its_keys_asked_early_or_late(precision, asked_first):
    keys, values, asked = keys_of(5 * BLOCK + 7), keys_of(5 * BLOCK + 7, 3), asked_of()
    store = BlockStore()
    store.use(Tier(precision=precision), Tier().shelf())
    store.append(keys[:, :, :BLOCK], values[:, :, :BLOCK])
    if asked_first:
        looked_up(store, 0, asked, 0, BLOCK)
    twin = copy.deepcopy(store)
    for each in (store, twin):
        each.append(keys[:, :, BLOCK:], values[:, :, BLOCK:])
    held = store.read(0, len(store))[0]
    for row in range(ROWS):
        found = looked_up(store, row, asked, 5, len(store))
        off = (found - true_products(held, row, asked, 5)).abs()
        assert off[..., -7:].max() < 1e-4
        assert off.max() < (1e-4 if precision == "exact" else most_off(held, asked))
        assert torch.equal(looked_up(twin, row, asked, 5, len(store)), found)
    store.pick_rows(torch.tensor([1, 1, 0]))
    for row, was in enumerate((1, 1, 0)):
        assert torch.equal(
            looked_up(store, row, asked, 5, len(store)), looked_up(twin, was, asked, 5, len(store))
        )


@pytest.mark.parametrize("precision", ["float16", "int8", "exact"])
def test_a_tier_tells_single_keys_of_whole_blocks_and_of_the_open_one(precision):
    keys, store = keys_of(3 * BLOCK + 7), BlockStore()
    store.use(Tier(precision=precision), Tier().shelf())
    store.append(keys, keys)
    held = store.read(0, len(store))[0]
    of_both, of_open, of_whole = [0, BLOCK, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 6], [3 * BLOCK + 1] * 3, [1]
    for tokens in map(torch.tensor, (of_both, of_open, of_whole)):
        for row in range(ROWS):
            found = store.keys_at(row, tokens.expand(HEADS, -1))
            most = 0 if precision == "exact" else 60 / 127  # numbers lie within 60 of one another
            away = (found - held[row][:, tokens]).abs()
            assert away.max() <= most
            assert (away[:, tokens >= 3 * BLOCK] == 0).all()


def test_what_a_tier_gives_up_is_let_go_of():
    keys, asked = keys_of(9 * BLOCK), asked_of()
    store, free = BlockStore(), BlockStore()
    free.use(Tier(), Tier().shelf())
    size = 2 * ROWS * HEADS * BLOCK * SIZE * 2  # a block of keys and values, two bytes each
    store.use(Tier(), Tier().shelf(), 3 * size)
    for each in (store, free):
        each.append(keys[:, :, :BLOCK], keys[:, :, :BLOCK])
        looked_up(each, 0, asked, 0, BLOCK)
        each.append(keys[:, :, BLOCK:], keys[:, :, BLOCK:])
    assert store.first == 6 * BLOCK
    mine, all_of_it = (looked_up(each, 1, asked, 6 * BLOCK, 9 * BLOCK) for each in (store, free))
    assert torch.equal(mine, all_of_it)
    per_token = ROWS * HEADS * SIZE
    freed = 3 * 2 * BLOCK * per_token + 3 * ROWS * HEADS * SIZE * 8  # three segments, and their scales
    assert free._index.nbytes() - store._index.nbytes() == freed


def test_a_limit_below_a_block_lets_nothing_grow():
    keys, asked, store = keys_of(9 * BLOCK), asked_of(), BlockStore()
    store.use(Tier(), Tier().shelf(), 10)
    store.append(keys[:, :, : BLOCK + 1], keys[:, :, : BLOCK + 1])
    looked_up(store, 0, asked, BLOCK, BLOCK + 1)
    store.append(keys, keys)
    assert store.first == store.whole and not store._index._segments


def test_bytes_held_count_it():
    keys, asked = keys_of(4 * BLOCK), asked_of()
    store = BlockStore()
    store.use(Tier(), Tier().shelf())
    store.append(keys, keys)
    before = store.nbytes()["ram"]
    looked_up(store, 0, asked, 0, BLOCK)
    assert store.nbytes()["ram"] - before == store._index.nbytes() > ROWS * HEADS * SIZE * 4 * BLOCK
