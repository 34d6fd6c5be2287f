"""The best of blocks: the same however the keys come in pieces, and whoever multiplies."""

from __future__ import annotations

import pytest
import torch

from everlong.attention.block_maxima import BlockMaxima

HEADS, ASKED, SIZE = 2, 3, 4


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def brute_force(asked, keys, begin, stop, block):
    """Return shape (heads, c, blocks), one number at a time."""
    rows = []
    for head in range(HEADS):
        rows.append([])
        for at in range(begin, stop, block):
            some = range(at, min(at + block, stop))
            rows[-1].append([max(float(keys[head, n] @ asked[head, c]) for n in some) for c in range(ASKED)])
    return torch.tensor(rows).mT


@pytest.mark.parametrize("block", [1, 5, 16, 100])
@pytest.mark.parametrize(("begin", "stop"), [(0, 64), (3, 61), (16, 48), (10, 13)])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_of_blocks_whatever_the_pieces(block, begin, stop, seed):
    asked = torch.randn(HEADS, ASKED, SIZE, generator=drawn(seed))
    keys = torch.randn(HEADS, 70, SIZE, generator=drawn(seed + 50))
    cuts = [0, *sorted(torch.randint(0, 70, (seed * 3,), generator=drawn(seed)).tolist()), 70]
    best = BlockMaxima(asked, begin, stop, block)
    for first, last in zip(cuts, cuts[1:], strict=False):
        best.look(first, keys[:, first:last])
    torch.testing.assert_close(best.found, brute_force(asked, keys, begin, stop, block))


def test_products_that_stand_for_others_are_scaled_once_the_best_are_known():
    asked = torch.randn(HEADS, ASKED, SIZE, generator=drawn(1))
    products = torch.randint(-50, 50, (HEADS, ASKED, 24), generator=drawn(2), dtype=torch.int32)
    best, scaled = BlockMaxima(asked, 4, 20, 8), []
    best.take(0, products, lambda some: scaled.append(some.shape[2]) or some.float() * 0.5 + 3)
    assert torch.equal(best.found, products[..., 4:20].unflatten(2, (2, 8)).amax(3) * 0.5 + 3)
    assert sum(scaled) == 2


def test_where_nothing_was_looked_at_nothing_is_found():
    best = BlockMaxima(torch.zeros(HEADS, ASKED, SIZE), 8, 24, 8)
    best.look(0, torch.ones(HEADS, 8, SIZE))
    best.look(24, torch.ones(HEADS, 8, SIZE))
    assert torch.equal(best.found, torch.full((HEADS, ASKED, 2), -torch.inf))
    best.look(15, torch.ones(HEADS, 2, SIZE))
    assert torch.equal(best.found, torch.zeros(HEADS, ASKED, 2))
