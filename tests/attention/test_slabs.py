"""Tensors that stay lie apart from the heap: copies, none on another, their pages gone with the last."""

from __future__ import annotations

import copy
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from everlong.attention import key_index, slabs
from everlong.attention.key_index import KeyIndex
from everlong.attention.shelves import DiskShelf, RamShelf
from everlong.attention.slabs import Slabs

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


def test_pages_are_given_back_with_the_last_tensor_in_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def pages(*arguments: Any, **fields: Any) -> mmap.mmap:
        found = mmap.mmap(*arguments, **fields)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(slabs, "mmap", _With(mmap, mmap=pages))
    room = Slabs()
    monkeypatch.setattr(slabs, "_SLAB", 16 * 4096)
    kept = [room.keep(torch.ones(1024)) for _ in range(40)]
    assert len(made) == 3, "sixteen of them in each"
    del kept[:15]
    assert made[0]() is not None
    del kept[:1]
    assert made[0]() is None and made[1]() is not None
    del room, kept
    assert all(each() is None for each in made)


class _With:
    """A module with other names in it."""

    def __init__(self, module: Any, **others: Any) -> None:
        self.__dict__.update(vars(module), **others)


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
        first.append(torch.randn(1, 2, 8, 4))
        theirs = first._segments[-1].clone()
        twin.append(torch.randn(1, 2, 8, 4))
        assert torch.equal(first._segments[-1], theirs)
        assert not torch.equal(twin._segments[-1], theirs)
        for index in (first, twin):
            assert all(map(torch.equal, index._segments, before))
