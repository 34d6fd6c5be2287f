"""What is learned of what was elicited: what the text adds most, and something of every sentence."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from everlong.memory.lessons import Lesson
from everlong.memory.recipes import Recipe
from everlong.memory.selection import Selected, select
from tests.memory.students import lesson


def of(sentence: int, gain: float, words: str = "", length: int = 4) -> Lesson:
    """A lesson about a sentence, alike to no other."""
    unique = words or f"w{sentence}x{gain}".replace(".", "").replace("-", "m")
    return lesson(
        unique, f" {unique} r{unique}"[:length].ljust(length, "z"), sentences=(sentence,), gain=gain
    )


def chosen(selected: Selected) -> list[float | None]:
    return [one.pair.gain for one in selected.lessons]


def test_the_best_are_kept_in_their_order() -> None:
    lessons = [of(0, 0.2), of(0, -0.1), of(1, 1.5), of(1, 0.0), of(0, 0.6)]
    selected = select(lessons, Recipe(), sentences=2, seed=0)
    assert chosen(selected) == [0.2, 1.5, 0.6]
    assert selected.dropped == {"no gain": 2} and selected.uncovered == ()


def test_a_small_gain_is_kept_only_where_the_sentence_has_no_better() -> None:
    lessons = [of(0, 0.3), of(0, 0.2), of(1, 0.04), of(1, 0.03), of(2, -0.2)]
    selected = select(lessons, Recipe(least_gain=0.25), sentences=3, seed=0)
    assert chosen(selected) == [0.3, 0.04]
    assert selected.dropped == {"no gain": 3} and selected.uncovered == (2,)
    twice = select(lessons, Recipe(least_gain=0.25, coverage=2), 3, 0)
    assert chosen(twice) == [0.3, 0.2, 0.04, 0.03]
    assert select(lessons, Recipe(least_gain=0.25, coverage=3), 3, 0).uncovered == (0, 1, 2)
    assert chosen(select(lessons, Recipe(least_gain=0.25, coverage=0), 3, 0)) == [0.3]


def test_a_budget_takes_the_best_first_and_something_of_every_sentence() -> None:
    lessons = [of(0, g / 10, length=10) for g in (5, 9, 7, 8)] + [of(1, 0.1, length=10)]
    selected = select(lessons, Recipe(budget=20), sentences=2, seed=0)
    assert chosen(selected) == [0.9, 0.8, 0.1]
    assert selected.dropped == {"over budget": 2}


def test_near_duplicates_are_dropped_the_lesser_one() -> None:
    text = "who keeps the bees that Orla has had since May in her garden"
    lessons = [
        lesson(text, " Orla", sentences=(0,), gain=0.4),
        lesson(text + " now", " Orla", sentences=(0,), gain=0.5),
        lesson(text, " Orla", sentences=(1,), gain=0.3),  # about something else
        lesson("who sells", " Orla", sentences=(0,), gain=0.2),
    ]
    selected = select(lessons, Recipe(), sentences=2, seed=0)
    assert chosen(selected) == [0.5, 0.3, 0.2]
    assert selected.dropped == {"near duplicate": 1}


def test_all_is_all() -> None:
    lessons = [of(0, -1.0), of(0, 2.0)] + [of(0, 2.0)]
    selected = select(lessons, Recipe(selection="all", budget=1), sentences=3, seed=0)
    assert selected.lessons == lessons and selected.dropped == {} and selected.uncovered == (1, 2)


def test_a_random_choice_has_as_many_tokens_and_depends_on_the_seed_alone() -> None:
    draws = random.Random(0)
    lessons = [of(i % 5, draws.uniform(-1, 1), length=draws.randrange(4, 12)) for i in range(40)]
    best = select(lessons, Recipe(), sentences=5, seed=0)
    wanted = sum(one.words for one in best.lessons)
    found = [select(lessons, Recipe(selection="random"), sentences=5, seed=seed) for seed in (0, 0, 1)]
    assert chosen(found[0]) == chosen(found[1]) != chosen(found[2])
    for selected in found:
        tokens = [one.words for one in selected.lessons]
        assert wanted <= sum(tokens) < wanted + max(tokens)
        assert selected.dropped == {"not drawn": 40 - len(tokens)}
        assert min(gain or 0.0 for gain in chosen(selected)) < 0, "whatever the gain"


def test_the_end_of_an_answer_does_not_count_for_the_budget() -> None:
    answers = [replace(of(0, gain, length=5), ends=True) for gain in (0.9, 0.8, 0.7)]
    assert chosen(select(answers, Recipe(budget=8), sentences=1, seed=0)) == [0.9, 0.8]


@pytest.mark.parametrize("selection", ["gain", "random", "all"])
def test_nothing_to_choose_from_is_nothing(selection: str) -> None:
    recipe = Recipe(selection=selection)  # type: ignore[arg-type]
    assert select([], recipe, sentences=3, seed=0).lessons == []
    assert select([], recipe, sentences=3, seed=0).uncovered == (0, 1, 2)
