"""What a stream's model knows by heart, as far as a stream needs to know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from everlong.attention import Attachment, Policy, StreamCache
from everlong.attention.prefix import Prefix
from everlong.errors import StateError


@dataclass(frozen=True)
class Memories:
    """What a stream's model knows by heart.

    Attributes
    ----------
    names : tuple of str
        Of the memories.
    weights : tuple of float
        By how much each counts.
    adapter : str
        What is made of them is called: an adapter of the model's, or a prefix.
    prefix : Prefix or None
        What streams begin with, if it is one.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    adapter: str
    prefix: Prefix | None = field(default=None, compare=False, repr=False)

    def values(self) -> dict[str, Any]:
        """Return what is saved of them, as JSON takes it."""
        return {"names": self.names, "weights": self.weights, "adapter": self.adapter}


def put_on(cache: StreamCache, memories: Memories | None) -> None:
    """Let forwards of a stream, which begins with its prefix already, use the adapter."""
    cache.adapter = None if memories is None or memories.prefix is not None else memories.adapter


def new_cache(attachment: Attachment, policy: Policy | None, memories: Memories | None) -> StreamCache:
    """Return the cache of a new stream that knows `memories`."""
    cache = attachment.new_cache(policy, prefix=None if memories is None else memories.prefix)
    put_on(cache, memories)
    return cache


def recalled(saved: Any, recall: Callable[[Memories], Memories] | None) -> Memories | None:
    """Load the memories of a saved session, the very ones."""
    if saved is None:
        return None
    before = Memories(tuple(saved["names"]), tuple(saved["weights"]), saved["adapter"])
    if recall is None:
        raise StateError(f"the session has memories ({', '.join(before.names)}): restore it by llm.restore()")
    memories = recall(before)
    if memories.adapter != before.adapter:
        raise StateError(
            f"the session was saved with other memories than those now named {', '.join(before.names)}: what "
            "it has read was read with the former ones; begin a new session"
        )
    return memories
