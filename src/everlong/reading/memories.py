"""What a stream's model knows by heart, as far as a stream needs to know it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from everlong.errors import StateError


@dataclass(frozen=True)
class Memories:
    """What a stream's model knows by heart; its adapter is on the model for as long as this is held.

    Attributes
    ----------
    names : tuple of str
        Of the memories.
    weights : tuple of float
        By how much each counts.
    adapter : str
        What the model's adapter made of them is called.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    adapter: str


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
