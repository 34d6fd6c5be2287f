"""What leaves the window while a session reads is learned: the reading side of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from everlong.attention import Policy
from everlong.errors import ConfigurationError, StateError
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.memories import Memories, Router
from everlong.reading.reports import Learned
from everlong.reading.tape import Tape


class Learner(Protocol):
    """Learns a text that comes in pieces, segment by segment, into one memory."""

    @property
    def memories(self) -> Memories | None:
        """What the session knows by heart with it; None: nothing."""

    def require_same(self, memorize: Any) -> None:
        """Raise unless this is what ``memorize`` asks for."""

    def take(self, text: str) -> None:
        """Take a piece of the text."""

    def learn(self, progress: Callable[[Any], None] | None, *, rest: bool) -> None:
        """Learn the segments that are whole, or (`rest`) all that was taken."""

    def drop(self) -> None:
        """Forget what was taken and is not learned."""

    def report(self) -> Learned:
        """Tell where it stands."""

    def state(self) -> dict[str, Tensor]:
        """Return tensors from which it is made again."""


class Learners(Protocol):
    """Makes learners for the sessions of one model."""

    def begin(self, memorize: Any, file: str | None, before: Memories | None) -> Learner:
        """Make one as ``memorize`` asks, for a session that reads a file of that name and knows `before`."""

    def restored(self, state: dict[str, Tensor], before: Memories | None) -> Learner:
        """Make one again from its state."""


def begin_learning(
    learners: Callable[[], Learners] | None,
    memorize: Any,
    source: Any,
    policy: Policy,
    before: Memories | Router | None,
) -> Learner:
    """Make a learner for a stream of that policy, whose model knows `before`.

    Raises
    ------
    StateError
        The session knows no way to make one.
    ConfigurationError
        Nothing ever leaves its window; nothing can be added to what it knows; or what is asked for cannot be.
    """
    if learners is None:
        raise StateError("this session cannot learn: begin it by llm.session()")
    if before is not None and not isinstance(before, Memories):
        raise ConfigurationError(
            "memorize: this session chooses a memory for each answer and reads without any, so that none can "
            "grow while it reads; begin one with named memories, or with none, and choose afterwards"
        )
    if before is not None and before.prefix is not None:
        raise ConfigurationError(
            f"memorize: this session begins with a cartridge ({before.names[0]}), which is used alone: no "
            "other memory can grow beside it; begin one with LoRA memories, or with none"
        )
    if policy.span is None:
        why = (
            "what is forgotten goes when reading ends" if policy.forgets else "nothing ever leaves the window"
        )
        raise ConfigurationError(
            f"memorize: under {type(policy).__name__} {why}, too late or never to be learned; use a "
            "policy with a window, such as LMInfinite(window=2048), or learn the text by llm.memorize()"
        )
    file = source if isinstance(source, Path) else getattr(source, "name", None)
    return learners().begin(memorize, file if file is None else Path(str(file)).stem, before)


def learn_what_left(
    tape: Tape, learner: Learner, progress: Callable[[Any], None] | None, *, rest: bool = False
) -> None:
    """Let a learner have what has left the window, or all (`rest`), and learn; the stream then knows it."""
    with deferred_interrupt():
        first = None if rest else tape.driver.cache.first_kept
        learner.take(tape.trail.leave(first, tape.model.tokenizer))
    try:
        learner.learn(progress, rest=rest)
    finally:
        tape.use(learner.memories)
