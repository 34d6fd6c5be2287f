"""What a forward calls its cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Both names, the present one first; transformers still takes the older one, with a warning."""


def cache_argument(decoder: Any) -> str:
    """Return the name under which the forward of `decoder`, and the model around it, takes its cache."""
    return _name_in(type(decoder).forward)


@functools.lru_cache(maxsize=64)
def _name_in(function: Callable[..., Any]) -> str:
    names = inspect.signature(function).parameters
    return next((name for name in CACHE_ARGUMENTS if name in names), CACHE_ARGUMENTS[-1])
