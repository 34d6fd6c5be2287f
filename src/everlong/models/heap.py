"""How the C library treats what is freed: it keeps some of it, as the next forward will want as much.

What a forward allocates is free when it ends. glibc gives the end of its heap back to the system if that is
larger than some megabytes, and gets it again, page by page, for the next one, which takes time that reading
under policies that recall can do without. What stays lies between what comes and goes, little as it is, and
makes holes that are too small for what comes next: their pages are given back now and then.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

KEPT = 2**28
"""Free bytes at the end of the heap that are kept."""

TOKENS = 2**14
"""Tokens after which the pages of holes are given back, which takes milliseconds; some are got anew."""

_LARGEST = 2**25  # bytes of what is taken from the heap, and not from the system: the most that glibc takes
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as malloc.h calls them
_SETTINGS = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}


_is_kept = False
_since = 0  # tokens


@cache
def keep_what_is_freed() -> bool:
    """Have this process keep the end of its heap, up to :data:`KEPT` bytes; return whether that was done.

    It is not where the environment sets what glibc does, and under other C libraries.
    """
    global _is_kept
    if _SETTINGS & set(os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    _is_kept = bool(library.mallopt(_TRIM_THRESHOLD, KEPT) and library.mallopt(_MMAP_THRESHOLD, _LARGEST))
    return _is_kept


def give_holes_back(tokens: int) -> None:
    """Take note that so many tokens went through a model; each time that they are `TOKENS`, give holes back.

    It does nothing in a process that does not keep what is freed. Threads may lose some of the count.
    """
    global _since
    _since += tokens
    if _is_kept and _since >= TOKENS:
        _since = 0
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(KEPT))
