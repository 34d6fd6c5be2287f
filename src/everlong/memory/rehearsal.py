"""What is learned again beside what is new: dealt out over the passes, others in each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import cycle, pairwise

from everlong.memory.lessons import Lesson


def dealt(lessons: Sequence[Lesson], passes: int) -> list[list[Lesson]]:
    """Deal lessons out for each pass, each once, and together what stands together."""
    ends = [number * len(lessons) // passes for number in range(passes + 1)]
    return [list(lessons[begin:end]) for begin, end in pairwise(ends)]


def rehearsed(
    lessons: Sequence[Lesson], passes: int, tokens: float, draws: random.Random
) -> list[list[Lesson]]:
    """Draw lessons for each pass, so many tokens or all: none comes twice before all came once.

    Parameters
    ----------
    lessons : sequence of Lesson
        Those learned earlier.
    passes : int
        For how many passes to draw.
    tokens : float
        Of each pass; the last lesson may exceed it.
    draws : random.Random
        Of their order.
    """
    found: list[list[Lesson]] = [[] for _ in range(passes)]
    order = cycle(draws.sample(lessons, len(lessons)))
    for some in found:
        room = tokens
        while room > 0 and len(some) < len(lessons):
            some.append(next(order))
            room -= len(some[-1])
    return found
