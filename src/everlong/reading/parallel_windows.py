"""Parallel Context Windows: parts of a text read apart, each from position 0, and seen together."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from everlong.attention import StreamCache
from everlong.attention.beside import beside, require_beside
from everlong.attention.policy import require_count
from everlong.errors import ConfigurationError
from everlong.reading.driver import Driver
from everlong.reading.interrupt import deferred_interrupt
from everlong.reading.outside import FORWARD, Errand, ReadingMethod, Task, reading_method
from everlong.reading.reports import Generation
from everlong.reading.sentences import LONGEST, packed


@reading_method("parallel-windows")
@dataclass(frozen=True)
class ParallelWindows(ReadingMethod):
    """Parallel Context Windows for Large Language Models (Ratner et al., ACL 2023, arXiv 2212.10947).

    The text is cut into windows, each of which is read by full attention as if it were alone. What is kept:
    the keys of all of them. What the question and the answer see: all windows, and what stands before them in
    themselves. At which positions: each window's tokens at those at which they were read, the question behind
    the end of the longest window. What is forgotten: nothing, but no window knows of another.

    As the authors keep one start token for all windows, what the conversation begins with is read once, and
    every window follows it. Windows end with a sentence. The authors had three windows at most; with more of
    them the question's attention is spread over more tokens than it ever was in training.

    Parameters
    ----------
    window : int, optional
        Tokens of the text in a window, at most; by default what the model's training length leaves beside the
        question and the answer.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        require_count("ParallelWindows", "window", self.window, least=1, optional=True)

    def answer(self, task: Task) -> Generator[str, Any, Generation]:
        """Read the windows; write what follows all of them."""
        require_beside(task.model.attachment.layers)
        errand = Errand(task, LONGEST if self.window is None else min(LONGEST, self.window))
        window = self._window(errand)
        cache = beside(self._streams(errand, window), len(errand.opening), task.model.attachment.layers)
        return (yield from errand.write(errand.asked(cache)))

    def _streams(self, errand: Errand, window: int) -> Iterator[StreamCache]:
        """Yield a stream for each window: the conversation's opening, and the window's tokens behind it."""
        begun = errand.new_cache()
        if errand.opening:
            self._run(errand, begun, errand.opening)
        for sentences in packed(errand.sentences(), window):
            stream = begun.fork()
            self._run(errand, stream, list(chain(*sentences)))
            yield stream

    def _run(self, errand: Errand, cache: StreamCache, ids: list[int]) -> None:
        driver = Driver(errand.task.model.attachment, cache, False)
        for at in range(0, len(ids), FORWARD):
            with deferred_interrupt():
                driver.run(ids[at : at + FORWARD], logits=False)
        errand.ran(driver.seconds, cache)

    def _window(self, errand: Errand) -> int:
        """Return the tokens of a window; raise where the training length does not hold it."""
        least = self.window or LONGEST
        room = errand.room(self, least, f"a window of {least}")
        window = self.window or room
        if window is None:
            raise ConfigurationError(
                "the model does not name its training length: pass ParallelWindows(window=...)"
            )
        return window
