"""Where the blocks of a tier lie: in RAM, or in a file that is gone with the process, however it ends."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, Self

import torch
from torch import Tensor

Block = Any
"""What a shelf gives for a block: as long as somebody has it, the block is there."""


Form = tuple[tuple[torch.Size, torch.dtype], ...]
"""Shapes and types of a block's tensors."""


class Shelf(Protocol):
    """Keeps blocks: some tensors each, which do not change.

    Attributes
    ----------
    kind : str
        "ram" or "disk".
    """

    kind: str

    def put(self, tensors: Sequence[Tensor]) -> Block:
        """Keep a block.

        Raises
        ------
        OSError
            There is no room for it.
        """

    def get(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Return the tensors of at least one block, all of one form, stacked along a new first dimension.

        Raises
        ------
        OSError
            They cannot be read.
        """


class RamShelf:
    """Keeps blocks in RAM."""

    kind = "ram"

    def put(self, tensors: Sequence[Tensor]) -> Block:
        """Keep a copy."""
        with torch.inference_mode(False):
            return tuple(tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors)

    def get(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Return the blocks' tensors, stacked."""
        return [torch.stack(tensors) for tensors in zip(*blocks, strict=True)]


class _Place:
    """A block in a file; its place is free again when nobody has it any more."""

    __slots__ = ("_freed", "begin", "form")

    def __init__(self, begin: int, form: Form, freed: deque[int]) -> None:
        self.begin = begin
        self.form = form
        self._freed = freed

    def __del__(self) -> None:
        self._freed.append(self.begin)  # at any moment, the lock held or not


class DiskShelf:
    """Keeps blocks in a file without a name: the system takes it away when the process ends or is killed.

    Blocks are read and written by calls rather than mapped into memory: what fails is an error then, not the
    end of the process, and what the system holds of the file is not counted as the process's memory.

    Parameters
    ----------
    folder : Path
        Where; it must exist.

    Raises
    ------
    OSError
        Nothing can be written there.
    """

    kind = "disk"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = tempfile.TemporaryFile(prefix="everlong-", dir=folder, buffering=0)  # noqa: SIM115
        self._freed: defaultdict[Form, deque[int]] = defaultdict(deque)
        self._length = 0
        self._lock = Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # blocks do not change, and copies share them

    def put(self, tensors: Sequence[Tensor]) -> Block:
        """Write a block where one like it was, or at the end."""
        flat = [tensor.detach().to("cpu").contiguous() for tensor in tensors]
        data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in flat)
        form = tuple((tensor.shape, tensor.dtype) for tensor in flat)
        with self._lock:
            freed = self._freed[form]
            begin = freed.popleft() if freed else self._length
            try:
                self._file.seek(begin)
                if self._file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                if begin < self._length:
                    freed.appendleft(begin)
                raise
            self._length = max(self._length, begin + len(data))
        return _Place(begin, form, freed)

    def get(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Read blocks, those at once that lie one behind the other."""
        form: Form = blocks[0].form
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in form]
        each = sum(sizes)
        data = torch.empty(len(blocks), each, dtype=torch.uint8)
        with self._lock:
            for first, last in _runs([block.begin for block in blocks], each):
                wanted = memoryview(data[first:last].numpy()).cast("B")  # type: ignore[arg-type]
                self._file.seek(blocks[first].begin)
                if self._file.readinto(wanted) != len(wanted):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
        ends = [0, *accumulate(sizes)]
        return [
            data[:, first:last].contiguous().view(dtype).reshape(len(blocks), *shape)
            for (first, last), (shape, dtype) in zip(pairwise(ends), form, strict=True)
        ]


def _runs(begins: Sequence[int], each: int) -> Iterator[tuple[int, int]]:
    """Yield which blocks, of `each` bytes, follow one another in the file."""
    first = 0
    for at in range(1, len(begins) + 1):
        if at == len(begins) or begins[at] != begins[at - 1] + each:
            yield first, at
            first = at
