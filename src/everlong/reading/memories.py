"""What a stream's model knows by heart, as far as a stream needs to know it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from everlong.attention.prefix import Prefix
from everlong.errors import StateError

if TYPE_CHECKING:
    from everlong.reading.tape import Tape

Recall = Callable[[Sequence[str], Sequence[float] | None], "Memories | Router"]
"""Puts memories on the model by their names and weights."""


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


class Router(Protocol):
    """What chooses the memories that a stream answers with; see :class:`everlong.memory.routing.Routing`."""

    names: tuple[str, ...]
    """What it was asked for by."""

    def choose(self, text: str) -> Memories | None:
        """Return the memories that a text is about; None: none."""

    def is_surer(self, with_memories: Tensor, without: Tensor) -> bool:
        """Whether the next token's logits (vocabulary,) with memories are surer than those without."""


def lasting(known: Memories | Router | None) -> Memories | None:
    """Return what a stream is read with: chosen memories answer, and are put away again."""
    return known if isinstance(known, Memories) else None


def beginning(known: Memories | Router | None) -> Prefix | None:
    """Return what a stream begins with because of what it knows."""
    return known.prefix if isinstance(known, Memories) else None


def route(tape: Tape, known: Memories | Router | None, text: str, chunk: int) -> Tape:
    """Let a router choose what the model knows while it writes what follows on a tape.

    What waits on the tape is run without memories and, if some are about `text`, with them too; the next
    token says which of the two goes on. Without a router nothing happens.

    Parameters
    ----------
    tape : Tape
        Where the model is to write.
    known : Memories or Router or None
        What the stream's model knows, or what chooses it.
    text : str
        What the writing is about.
    chunk : int
        Tokens run at a time.

    Returns
    -------
    Tape
        Where to write: the tape itself, or a copy with memories.
    """
    tape.use(lasting(known))
    if known is None or isinstance(known, Memories):
        return tape
    chosen = known.choose(text)
    if chosen is None:
        return tape
    other = tape.fork()
    other.use(chosen)
    before = tape.driver.seconds
    for each in (tape, other):
        each.run_all(chunk, logits=True)
    assert tape.driver.logits is not None and other.driver.logits is not None, "nothing stands on the tape"
    if not known.is_surer(other.driver.logits, tape.driver.logits):
        tape.driver.seconds += other.driver.seconds - before
        return tape
    other.driver.seconds += tape.driver.seconds - before
    return other


def to_saved(known: Memories | Router | None) -> dict[str, Any] | None:
    """Return what a saved session says of its memories."""
    if known is None:
        return None
    if isinstance(known, Memories):
        return known.values()
    return {"names": known.names, "weights": None, "adapter": None}


def recalled(saved: Any, recall: Recall | None) -> Memories | Router | None:
    """Load the memories of a saved session: the very ones, unless they are chosen for each question."""
    if saved is None:
        return None
    names, adapter = list(saved["names"]), saved["adapter"]
    if recall is None:
        raise StateError(f"the session has memories ({', '.join(names)}): restore it by llm.restore()")
    known = recall(names, saved["weights"])
    if adapter is not None and getattr(known, "adapter", None) != adapter:
        raise StateError(
            f"the session was saved with other memories than those now named {', '.join(names)}: what "
            "it has read was read with the former ones; begin a new session"
        )
    return known
