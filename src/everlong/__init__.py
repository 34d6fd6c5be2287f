"""Endless context for any off-the-shelf language model.

``import everlong`` costs nothing: PyTorch and transformers are imported when a name below is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from everlong.attention import (
        H2O,
        POLICIES,
        Attachment,
        FullAttention,
        InfiniPot,
        InfLLM,
        LMInfinite,
        Policy,
        PyramidKV,
        ReAttention,
        Recall,
        SirLLM,
        SnapKV,
        StreamCache,
        StreamingLLM,
        Tier,
        attach,
        make_policy,
    )
    from everlong.llm import LLM, load
    from everlong.memory.folder import Memory
    from everlong.memory.passing import Learning
    from everlong.memory.record import MemoryRecord
    from everlong.memory.store import MemoryStore
    from everlong.models.catalogue import CATALOGUE
    from everlong.reading import Sampling, Session

_HOMES = {
    "everlong.attention": (
        *("H2O", "POLICIES", "Attachment", "FullAttention", "InfLLM", "InfiniPot", "LMInfinite", "Policy"),
        *("PyramidKV", "ReAttention", "Recall", "SirLLM", "SnapKV", "StreamCache", "StreamingLLM", "Tier"),
        *("attach", "make_policy"),
    ),
    "everlong.llm": ("LLM", "load"),
    "everlong.memory.folder": ("Memory",),
    "everlong.memory.passing": ("Learning",),
    "everlong.memory.record": ("MemoryRecord",),
    "everlong.memory.store": ("MemoryStore",),
    "everlong.models.catalogue": ("CATALOGUE",),
    "everlong.reading": ("Sampling", "Session"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CATALOGUE",
    "H2O",
    "LLM",
    "POLICIES",
    "Attachment",
    "FullAttention",
    "InfLLM",
    "InfiniPot",
    "LMInfinite",
    "Learning",
    "Memory",
    "MemoryRecord",
    "MemoryStore",
    "Policy",
    "PyramidKV",
    "ReAttention",
    "Recall",
    "Sampling",
    "Session",
    "SirLLM",
    "SnapKV",
    "StreamCache",
    "StreamingLLM",
    "Tier",
    "__version__",
    "attach",
    "load",
    "make_policy",
]


def __getattr__(name: str) -> Any:
    """Import what `name` stands for when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'everlong' has no attribute {name!r}")
    from everlong.models.collector import paused

    with paused():
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
