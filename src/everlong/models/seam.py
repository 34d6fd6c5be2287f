"""Puts one attention function under a decoder: its own copy of the configuration, under our name.

transformers looks an attention function up by ``config._attn_implementation``. Two models built from
one configuration share that object, so the decoder gets copies for as long as the seam is open.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "everlong"

_lock = threading.Lock()
_open_seams = 0


def _dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the attention function of the seam that `module` stands under."""
    return module.__dict__["_everlong_attention"](module, *args, **kwargs)


class Seam:
    """Routes the attention of all layers below `decoder` to `attention` until closed.

    Parameters
    ----------
    decoder : nn.Module
        A decoder whose layers go through transformers' attention interface.
    attention : callable
        Called as ``attention(module, query, key, value, attention_mask, **kwargs)``; query of shape
        (batch, heads, n, d), key and value (batch, key-value heads, n, d); returns the output of shape
        (batch, n, heads, d) and None.
    """

    def __init__(self, decoder: nn.Module, attention: Callable[..., Any]) -> None:
        self._originals: list[tuple[nn.Module, Any]] = []
        self._attention = attention
        self._decoder = decoder

    def open(self) -> None:
        """Replace the configurations, and register our name if this is the first open seam."""
        global _open_seams
        with _lock:
            if _open_seams == 0:
                ALL_ATTENTION_FUNCTIONS.register(NAME, _dispatch)
            _open_seams += 1
        copies: dict[int, Any] = {}
        for module in self._decoder.modules():
            config = module.__dict__.get("config")
            if config is None or not hasattr(config, "_attn_implementation"):
                continue
            if id(config) not in copies:
                ours = copy.deepcopy(config)
                ours._attn_implementation = NAME
                copies[id(config)] = ours
            self._originals.append((module, config))
            module.__dict__["config"] = copies[id(config)]
            module.__dict__["_everlong_attention"] = self._attention

    def close(self) -> None:
        """Put every configuration back, and take our name away with the last seam."""
        global _open_seams
        for module, config in self._originals:
            module.__dict__["config"] = config
            module.__dict__.pop("_everlong_attention", None)
        self._originals.clear()
        with _lock:
            _open_seams -= 1
            if _open_seams == 0:
                ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME, None)

    def __enter__(self) -> Seam:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def instance_attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of this one object, past the class's; give back what the object had."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        if before is not missing:
            module.__dict__[name] = before
