"""Where the blocks of a tier lie: in RAM, or in a file that is gone with the process, however it ends."""

from __future__ import annotations

import errno
import os
import tempfile
import warnings
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from everlong.attention.slabs import Slabs

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
        """Keep a block."""

    def get(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Return the tensors of at least one block, all of one form, stacked along a new first dimension.

        Raises
        ------
        OSError
            They cannot be read.
        """


class RamShelf:
    """Keeps blocks in RAM, apart from the heap."""

    kind = "ram"

    def __init__(self) -> None:
        self._slabs = Slabs()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return another shelf: what a copy of a stream puts down shares no page with what outlives it."""
        return type(self)()

    def put(self, tensors: Sequence[Tensor]) -> Block:
        """Keep a copy."""
        return tuple(map(self._slabs.keep, tensors))

    def get(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Return the blocks' tensors, stacked."""
        return _stacked(blocks)


def _stacked(blocks: Sequence[Block]) -> list[Tensor]:
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
        self._forms: dict[Form, Form] = {}  # each once, however many blocks have it
        self._length = 0
        self._in_ram: RamShelf | None = None  # once the file takes no more
        self._lock = Lock()
        weakref.finalize(self, self._file.close)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return the same: copies of a stream share the file."""
        return self

    def put(self, tensors: Sequence[Tensor]) -> Block:
        """Write a block where one like it was, or at the end; where there is no room, keep it in RAM."""
        flat = [tensor.detach().to("cpu").contiguous() for tensor in tensors]
        data = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in flat)
        form = tuple((tensor.shape, tensor.dtype) for tensor in flat)
        with self._lock:
            form = self._forms.setdefault(form, form)
            freed = self._freed[form]
            begin = freed.popleft() if freed else self._length
            try:
                self._file.seek(begin)
                _whole(self._file.write, memoryview(data), errno.ENOSPC)
            except OSError as error:
                if begin < self._length:
                    freed.appendleft(begin)
                if self._in_ram is None:
                    self._in_ram = RamShelf()
                    warnings.warn(
                        f"nothing more can be written in {self.folder} ({error}): the tier goes on in RAM",
                        stacklevel=2,
                    )
                return self._in_ram.put(flat)
            self._length = max(self._length, begin + len(data))
        return _Place(begin, form, freed)

    def get(self, blocks: Sequence[Block]) -> list[Tensor]:
        """Read blocks, those at once that lie one behind the other."""
        found = []
        for in_ram, some in groupby(blocks, is_in_ram):
            found.append((_stacked if in_ram else self._read)([*some]))
        return found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _read(self, places: Sequence[_Place]) -> list[Tensor]:
        form = places[0].form
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in form]
        each = sum(sizes)
        data = torch.empty(len(places), each, dtype=torch.uint8)
        with self._lock:
            for first, last in _runs([place.begin for place in places], each):
                wanted = memoryview(data[first:last].numpy()).cast("B")  # type: ignore[arg-type]
                self._file.seek(places[first].begin)
                _whole(self._file.readinto, wanted, errno.EIO)
        ends = [0, *accumulate(sizes)]
        return [
            data[:, first:last].contiguous().view(dtype).reshape(len(places), *shape)
            for (first, last), (shape, dtype) in zip(pairwise(ends), form, strict=True)
        ]


def is_in_ram(block: Block) -> bool:
    """Whether a block lies in RAM, whatever shelf it is from."""
    return not isinstance(block, _Place)


def _whole(call: Callable[[memoryview], int | None], data: memoryview, failure: int) -> None:
    """Read or write all of it: the system takes some two billion bytes at a time at most."""
    while data:
        done = call(data)
        if not done:
            raise OSError(failure, os.strerror(failure))
        data = data[done:]


def _runs(begins: Sequence[int], each: int) -> Iterator[tuple[int, int]]:
    """Yield which blocks, of `each` bytes, follow one another in the file."""
    first = 0
    for at in range(1, len(begins) + 1):
        if at == len(begins) or begins[at] != begins[at - 1] + each:
            yield first, at
            first = at
