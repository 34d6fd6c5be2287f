"""Whether there are kernels, and whether what runs now may take them.

Most are taken only in steps that are recorded: there what they give is held against PyTorch's before it is
believed, and there what they save is not lost among the calls around them. Attention to several parts, that
of many queries, their rotation, a token's while what was recalled stands, and looking at keys save enough by
themselves, and are held against plain operations by themselves (:mod:`everlong.attention.compiled_parts`,
:mod:`everlong.models.rotary`, :mod:`everlong.attention.compiled_standing`,
:mod:`everlong.attention.compiled_keys`).
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Any

SWITCH = "EVERLONG_KERNELS"
"""Environment variable, read once; 0: there are none."""

_records: ContextVar[bool] = ContextVar("everlong_records", default=False)


@contextmanager
def recording() -> Iterator[None]:
    """Let what runs meanwhile take kernels, if there are any."""
    token = _records.set(True)
    try:
        yield
    finally:
        _records.reset(token)


def in_use() -> bool:
    """Whether to take kernels: in a recording, where they can be had. The first time they are compiled."""
    return _records.get() and compiled() is not None


def is_recorded() -> bool:
    """Whether what runs is being recorded, and what no tape takes note of must not run."""
    return _records.get()


@functools.cache
def wanted() -> bool:
    """Whether there is what compiles kernels, and nobody does without."""
    return os.environ.get(SWITCH) != "0" and find_spec("numba") is not None


@functools.cache
def compiled(name: str = "compiled") -> Any:
    """Return a module of kernels, "compiled", "attending" or "turning"; None: there are none."""
    if not wanted():
        return None
    try:
        return import_module(f"everlong.kernels.{name}")
    except Exception as error:  # of a compiler's many ways to fail none is worth a user's text
        warnings.warn(
            f"no compiled kernels, and all is slower: {type(error).__name__}: {error}", stacklevel=2
        )
        return None
