"""Tensors that stay lie apart from the heap: copies, none on another, their pages gone with the last."""

from __future__ import annotations

import copy
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from everlong.attention import key_index, slabs
from everlong.attention.key_index import KeyIndex
from everlong.attention.shelves import DiskShelf, RamShelf
from everlong.attention.slabs import Slabs
from everlong.attention.tiers import BLOCK, BlockStore

SHAPES = [(3, 7), (1,), (0, 4), (2, 3, 50), (40, 40), *[(5, 5)] * 40]


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.bfloat16])
def test_what_is_kept_is_a_copy_and_none_lies_on_another(dtype: torch.dtype, inference: bool) -> None:
    room = Slabs()
    with torch.inference_mode(inference):
        given = [(50 * torch.randn(shape)).to(dtype).transpose(0, -1) for shape in SHAPES]
        kept = [room.keep(tensor) for tensor in given]
    for tensor, held in zip(given, kept, strict=True):
        assert torch.equal(tensor, held) and held.dtype == dtype and held.is_contiguous()
        assert not held.is_inference() and held.data_ptr() % 64 == 0
    for number, held in enumerate(kept):
        held.fill_(number)
    assert all(bool((held == number).all()) for number, held in enumerate(kept))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to the slabs that are made, of 40 times 4,096 bytes each."""
    found: list[Any] = []

    def pages(*arguments: Any, **fields: Any) -> mmap.mmap:
        slab = mmap.mmap(*arguments, **fields)
        found.append(weakref.ref(slab))
        return slab

    monkeypatch.setattr(slabs, "mmap", SimpleNamespace(**{**vars(mmap), "mmap": pages}))
    monkeypatch.setattr(slabs, "_SLAB", 40 * 4096)
    return found


def test_pages_are_given_back_with_the_last_tensor_in_them(made: list[Any]) -> None:
    room = Slabs()
    kept = [room.keep(torch.ones(1024)) for _ in range(100)]
    assert len(made) == 3
    del kept[:39]
    assert made[0]() is not None
    del kept[:1]
    assert made[0]() is None and made[1]() is not None
    del room, kept
    assert all(each() is None for each in made)


def test_what_a_copy_of_a_stream_put_down_goes_with_it(made: list[Any]) -> None:
    def some(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(1, 2, tokens, 16), torch.randn(1, 2, tokens, 16)

    store = BlockStore()
    for _ in range(100):
        store.append(*some(BLOCK))
        twin = copy.deepcopy(store)
        twin.append(*some(5 * BLOCK))
        assert all(map(torch.equal, twin.read(0, BLOCK), store.read(0, BLOCK)))
        del twin
    alive = sum(each() is not None for each in made)
    assert len(made) > 100 and alive * slabs._SLAB <= store.nbytes()["ram"] + slabs._SLAB


def test_what_is_kept_later_does_not_count_as_a_change_of_what_was_kept() -> None:
    room, weight = Slabs(), torch.ones(4, requires_grad=True)
    product = (weight * room.keep(torch.ones(4))).sum()
    room.keep(torch.ones(4))
    product.backward()
    assert weight.grad is not None


def test_blocks_in_ram_lie_together_whoever_puts_them_there(tmp_path: Path) -> None:
    full = DiskShelf(tmp_path)
    full._file = Mock(write=Mock(side_effect=OSError("full")))
    with pytest.warns(UserWarning, match="the tier goes on in RAM"):
        full.put([torch.ones(2000)])
    for shelf in (RamShelf(), full):
        with ThreadPoolExecutor(4) as pool:
            blocks = [
                *pool.map(shelf.put, ([torch.full((2000,), n), torch.ones(n % 3)] for n in range(1500)))
            ]
        assert all(torch.equal(block[0], torch.full((2000,), n)) for n, block in enumerate(blocks))
        pages = {tensor.untyped_storage().data_ptr() for block in blocks for tensor in block if len(tensor)}
        assert len(pages) <= 1500 * (2000 * 8 + 128) / slabs._SLAB + 2


def test_copies_of_an_index_go_on_in_pages_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_index, "SEGMENT", 8)
    for is_exact in (True, False):
        first = KeyIndex(is_exact=is_exact)
        first.append(torch.randn(1, 2, 16, 4))
        twin = copy.deepcopy(first)
        before = [segment.clone() for segment in first._segments]
        for index in (first, twin):
            index.append(torch.randn(1, 2, 8, 4))
        assert not torch.equal(first._segments[-1], twin._segments[-1])
        for index in (first, twin):
            assert all(map(torch.equal, index._segments, before))
        places = [segment.untyped_storage().data_ptr() for segment in (*first._segments, twin._segments[-1])]
        assert len(set(places[:3])) == 1 != len(set(places))
        first.pick_rows(torch.tensor([0, 0]))
        assert len({segment.untyped_storage().data_ptr() for segment in first._segments}) == 1
