"""What is learned again: every lesson in its turn."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from everlong.memory.lessons import Lesson
from everlong.memory.pairs import Pair
from everlong.memory.rehearsal import dealt, rehearsed


def lessons_of(*sizes: int) -> list[Lesson]:
    """Return lessons of so many tokens."""
    nothing = torch.zeros(1, 1)
    return [
        Lesson(Pair(str(number), "!", "cloze"), list(range(size - 1)), [0], nothing.long(), nothing)
        for number, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("count", [0, 1, 3, 10, 11])
def test_dealing_gives_every_lesson_to_one_pass_in_order(count: int) -> None:
    lessons = lessons_of(*[5] * count)
    turns = dealt(lessons, 4)
    assert len(turns) == 4 and [one for turn in turns for one in turn] == lessons
    assert max(map(len, turns)) - min(map(len, turns)) <= 1


@pytest.mark.parametrize("tokens", [0, 1, 20, 33, 1000])
@pytest.mark.parametrize("passes", [1, 5, 9])
def test_no_lesson_is_rehearsed_again_before_all_were(tokens: int, passes: int) -> None:
    lessons = lessons_of(7, 3, 9, 5, 4, 8)
    turns = rehearsed(lessons, passes, tokens, random.Random(0))
    assert len(turns) == passes
    for turn in turns:
        size = sum(map(len, turn))
        assert len({id(one) for one in turn}) == len(turn), "twice in one pass"
        assert len(turn) == len(lessons) or tokens <= size < tokens + 9
    times = Counter({id(one): 0 for one in lessons})
    times.update(id(one) for turn in turns for one in turn)
    assert max(times.values()) - min(times.values()) <= 1


def test_nothing_was_learned_and_nothing_is_rehearsed() -> None:
    assert rehearsed([], 3, 100, random.Random(0)) == [[], [], []]


def test_the_order_is_drawn() -> None:
    lessons = lessons_of(*[5] * 20)
    first, again, other = (rehearsed(lessons, 2, 40, random.Random(seed)) for seed in (0, 0, 1))
    assert first == again != other
