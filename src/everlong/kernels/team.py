"""The threads that PyTorch computes with, for kernels of our own.

Threads of another team would wait for a processor that PyTorch's own hold while they spin. So a kernel is run
by the OpenMP that PyTorch brought, where that is GNU's: its entry for compilers takes a function and runs it
in every thread of the team.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

from everlong.errors import StateError

THREAD, THREADS = "omp_get_thread_num", "omp_get_num_threads"
_RUN = "GOMP_parallel"


def symbols() -> dict[str, int]:
    """Return where a thread asks for its number, and how many they are; nothing where there is no team."""
    library = _openmp()
    if library is None:
        return {}
    names = (THREAD, THREADS)
    return {name: ctypes.cast(library[name], ctypes.c_void_p).value or 0 for name in names}


def has_team() -> bool:
    """Whether kernels can be run in PyTorch's threads."""
    return _openmp() is not None


def in_every_thread(address: int) -> Callable[[ctypes.Array[ctypes.c_int64], int], None]:
    """Return what runs the kernel at an address in so many threads of the team."""
    library = _openmp()
    if library is None:
        raise StateError("PyTorch's threads are not GNU's OpenMP: no kernel can be run in them")
    run = library[_RUN]
    run.restype, run.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return lambda arguments, threads: run(address, arguments, threads, 0)


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return PyTorch's own OpenMP, if it is GNU's."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path))
            if all(hasattr(library, name) for name in (THREAD, THREADS, _RUN)):
                return library
        except OSError:
            continue
    return None
