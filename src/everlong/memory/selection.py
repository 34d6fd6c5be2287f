"""Which pairs are learned: those that only the text makes likely, and something of every sentence."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from everlong.memory.lessons import Lesson
from everlong.memory.recipes import Recipe

_ALIKE = 0.8  # share of words in common


@dataclass(frozen=True)
class Selected:
    """What was chosen, and why the others were not.

    Attributes
    ----------
    lessons : list of Lesson
        To be learned.
    dropped : dict of str to int
        How many were dropped, by reason.
    uncovered : tuple of int
        Sentences that fewer pairs are about than the recipe asks for, and at least those that none is about.
    """

    lessons: list[Lesson]
    dropped: dict[str, int]
    uncovered: tuple[int, ...]


def select(lessons: Sequence[Lesson], recipe: Recipe, sentences: int, seed: int) -> Selected:
    """Choose among the lessons of a segment.

    Parameters
    ----------
    lessons : sequence of Lesson
        With their gains.
    recipe : Recipe
        How to choose.
    sentences : int
        That the segment has.
    seed : int
        Of a random choice.
    """
    dropped: Counter[str] = Counter()
    if recipe.selection == "all":
        return Selected(list(lessons), {}, _uncovered(lessons, sentences, recipe))
    by_gain = sorted(range(len(lessons)), key=lambda i: (-_gain(lessons[i]), i))
    chosen: list[int] = []
    known: dict[tuple[int, ...], list[set[str]]] = {}
    covered: Counter[int] = Counter()
    tokens = 0
    for number in by_gain:
        lesson = lessons[number]
        about = lesson.pair.sentences
        words = set(re.findall(r"\w+", f"{lesson.pair.query} / {lesson.pair.response}".lower()))
        is_needed = any(covered[sentence] < recipe.coverage for sentence in about)
        if any(_overlap(words, others) >= _ALIKE for others in known.get(about, [])):
            dropped["near duplicate"] += 1
        elif _gain(lesson) <= 0 or (_gain(lesson) < recipe.least_gain and not is_needed):
            dropped["no gain"] += 1
        elif recipe.budget is not None and tokens + lesson.words > recipe.budget and not is_needed:
            dropped["over budget"] += 1
        else:
            chosen.append(number)
            tokens += lesson.words
            covered.update(about)
            known.setdefault(about, []).append(words)
    if recipe.selection == "random":
        chosen = _at_random(lessons, tokens, seed)
        dropped = Counter({"not drawn": len(lessons) - len(chosen)})
    kept = [lessons[number] for number in sorted(chosen)]
    return Selected(kept, dict(dropped), _uncovered(kept, sentences, recipe))


def _at_random(lessons: Sequence[Lesson], tokens: int, seed: int) -> list[int]:
    """Draw lessons until their responses have that many tokens."""
    order = list(range(len(lessons)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    for number in order:
        if tokens <= 0:
            break
        chosen.append(number)
        tokens -= lessons[number].words
    return chosen


def _gain(lesson: Lesson) -> float:
    return lesson.pair.gain if lesson.pair.gain is not None else 0.0


def _overlap(a: set[str], b: set[str]) -> float:
    return len(a & b) / max(1, len(a | b))


def _uncovered(lessons: Sequence[Lesson], sentences: int, recipe: Recipe) -> tuple[int, ...]:
    about = Counter(sentence for lesson in lessons for sentence in lesson.pair.sentences)
    return tuple(number for number in range(sentences) if about[number] < max(1, recipe.coverage))
