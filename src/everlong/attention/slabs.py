"""Room for tensors that stay, apart from the heap in which others come and go.

Between what a forward allocates and frees, tensors that stay break up the C library's heap: the holes beside
them are too small for what comes next, and the process grows by more than it holds. Pages that the system
gives are no part of that heap, and go back to it when nobody has any of the tensors in them any more.
"""

from __future__ import annotations

import mmap
import sys
from threading import Lock

import torch
from torch import Tensor

_SLAB = 2**21  # bytes
_LINE = 64  # bytes to which each is aligned


class Slabs:
    """Keeps copies of tensors, many in each slab of pages; a page is taken when it is first written to."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0
        self._lock = Lock()

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a contiguous copy of a tensor, on the CPU."""
        size = -(-tensor.nbytes // _LINE) * _LINE
        with torch.inference_mode(False), torch.no_grad():
            with self._lock:
                if self._used + size > len(self._slab):
                    self._slab, self._used = _pages(max(_SLAB, size)), 0
                room = self._slab.data[self._used : self._used + tensor.nbytes]  # each with its own version
                self._used += size
            return room.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


def _pages(count: int) -> Tensor:
    """Return so many bytes of pages that nothing else is in, each nought."""
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    return torch.frombuffer(mmap.mmap(-1, count, **private), dtype=torch.uint8)
