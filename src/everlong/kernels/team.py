"""The threads that PyTorch computes with, for kernels of our own.

Threads of another team would wait for a processor that PyTorch's own hold while they spin. So a kernel is
run by the OpenMP that PyTorch calls, where that has GNU's entry for compilers: it takes a function, and runs
it in every thread of the team.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from everlong.errors import StateError

_RUN, _THREAD, _THREADS = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"


def has_team() -> bool:
    """Whether kernels can be run in PyTorch's threads."""
    return _openmp() is not None


@functools.cache
def in_every_thread(address: int) -> Callable[[Any, int], None]:
    """Return what runs the kernel at an address in so many threads of the team, each given the same."""
    run = _team()[_RUN]
    run.restype, run.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    return lambda given, threads: run(address, given, threads, 0)


@functools.cache
def asking_addresses() -> tuple[int, int]:
    """Return the addresses of what tells a thread its number, and of what tells how many they are."""
    team = _team()
    thread, threads = (ctypes.cast(team[name], ctypes.c_void_p).value or 0 for name in (_THREAD, _THREADS))
    return thread, threads


def _team() -> ctypes.CDLL:
    found = _openmp()
    if found is None:
        raise StateError("PyTorch's threads are not those of an OpenMP like GNU's: no kernel runs in them")
    return found


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Return the OpenMP that PyTorch calls, if it has what is needed."""
    for library in _candidates():
        if all(hasattr(library, name) for name in (_RUN, _THREAD, _THREADS)):
            return library
    return None


def _candidates() -> Iterator[ctypes.CDLL]:
    """Yield what is visible to all (put before PyTorch's own, as some do for speed), then PyTorch's own."""
    brought = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    for path in (None, *map(str, brought)):
        try:
            yield ctypes.CDLL(path)
        except (OSError, TypeError):  # Windows has nothing that is visible to all
            continue
