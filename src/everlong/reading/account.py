"""What a read costs."""

from __future__ import annotations

import time

from everlong.reading.reports import Learned, Progress, ReadReport, perplexity
from everlong.reading.tape import Tape


class Account:
    """What one read costs: the difference to the accounts when it began.

    Parameters
    ----------
    tape : Tape
        The session's, before the read.
    """

    def __init__(self, tape: Tape) -> None:
        driver = tape.driver
        self.tape = tape
        self._read, self._run = tape.read, driver.tokens
        self._nll_sum, self._nll_count = driver.nll_sum, driver.nll_count
        self._started = time.perf_counter()

    def report(self, learned: Learned | None = None) -> ReadReport:
        """Return the outcome."""
        seconds = time.perf_counter() - self._started
        tokens = self.tape.read - self._read
        return ReadReport(tokens, seconds, tokens / seconds, self._perplexity(), self.tape.stats(), learned)

    def progress(self, fraction: float | None, finished: bool = False) -> Progress:
        """Return how far it has come, `fraction` of the source being taken, if that is known."""
        read, seconds = self.tape.read - self._read, time.perf_counter() - self._started
        tokens = read if finished else self.tape.driver.tokens - self._run
        total = read if finished else max(tokens, round(read / fraction)) if fraction else None
        held = self.tape.driver.cache.bytes()
        return Progress(tokens, total, seconds, tokens / seconds, self._perplexity(), held)

    def _perplexity(self) -> float | None:
        driver = self.tape.driver
        return perplexity(driver.nll_sum - self._nll_sum, driver.nll_count - self._nll_count)
