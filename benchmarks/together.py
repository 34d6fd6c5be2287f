"""Sessions that write together: what scripts share that measure them."""

from __future__ import annotations

import time
from typing import Any

from everlong.attention import Attachment
from everlong.evaluation.speed import random_ids


def filled(handle: Attachment, decoder: Any, window: int, sessions: int) -> list[Any]:
    """Return caches of as many sessions, each of another length, their windows full."""
    caches = [handle.new_cache() for _ in range(sessions)]
    for number, cache in enumerate(caches):
        ids = random_ids(decoder, 2 * window + 50 * number)
        decoder(input_ids=ids[None], use_cache=True, **{handle.cache_argument: cache})
    return caches


def seconds_together(handle: Attachment, cache: Any, head: Any, rows: int, steps: int) -> list[float]:
    """Return what each of some steps takes that write a token in all rows of a batch, the head included."""
    seconds = []
    for _ in range(steps):
        ids = random_ids(handle.decoder, rows)[:, None]
        started = time.perf_counter()
        head(handle.step(cache, ids, hidden=True, undisturbed=True))
        seconds.append(time.perf_counter() - started)
    return seconds
