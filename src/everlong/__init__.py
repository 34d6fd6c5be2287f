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
        Bytes,
        DualChunk,
        FullAttention,
        InfiniPot,
        InfiniteHiP,
        InfLLM,
        LinearScaling,
        LMInfinite,
        NTKScaling,
        Policy,
        PyramidKV,
        Quest,
        ReAttention,
        Recall,
        SelfExtend,
        SirLLM,
        SnapKV,
        StreamCache,
        StreamingLLM,
        Tier,
        YaRN,
        attach,
        make_policy,
    )
    from everlong.llm import LLM, load
    from everlong.memory.folder import Memory
    from everlong.memory.passing import Learning
    from everlong.memory.record import MemoryRecord
    from everlong.memory.store import MemoryStore
    from everlong.models.catalogue import CATALOGUE
    from everlong.reading import Homer, InfiniRetri, ParallelWindows, Sampling, Session

_HOMES = {
    "everlong.attention": (
        *("POLICIES", "Attachment", "Bytes", "DualChunk", "FullAttention", "InfLLM", "LMInfinite"),
        *("LinearScaling", "NTKScaling", "Policy", "ReAttention", "Recall", "SelfExtend", "StreamCache"),
        *("StreamingLLM", "Tier", "YaRN", "attach", "make_policy"),
        *("H2O", "InfiniPot", "InfiniteHiP", "PyramidKV", "Quest", "SirLLM", "SnapKV"),
    ),
    "everlong.llm": ("LLM", "load"),
    "everlong.memory.folder": ("Memory",),
    "everlong.memory.passing": ("Learning",),
    "everlong.memory.record": ("MemoryRecord",),
    "everlong.memory.store": ("MemoryStore",),
    "everlong.models.catalogue": ("CATALOGUE",),
    "everlong.reading": ("Homer", "InfiniRetri", "ParallelWindows", "Sampling", "Session"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CATALOGUE",
    "H2O",
    "LLM",
    "POLICIES",
    "Attachment",
    "Bytes",
    "DualChunk",
    "FullAttention",
    "Homer",
    "InfLLM",
    "InfiniRetri",
    "InfiniPot",
    "InfiniteHiP",
    "LMInfinite",
    "Learning",
    "LinearScaling",
    "Memory",
    "MemoryRecord",
    "MemoryStore",
    "ParallelWindows",
    "NTKScaling",
    "Policy",
    "PyramidKV",
    "Quest",
    "ReAttention",
    "Recall",
    "Sampling",
    "SelfExtend",
    "Session",
    "SirLLM",
    "SnapKV",
    "StreamCache",
    "StreamingLLM",
    "Tier",
    "YaRN",
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
