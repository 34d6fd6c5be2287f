"""RULER's needles that need no text from elsewhere: one among sentences, one among many like it.

Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B. What a text is made of, and how answers are
scored, is as there. Different here: the wording; a key is asked for that stands at the depth that was chosen,
not at a random one; a text has as many items as fit, found without a loop that may not end; and an answer may
have twice the tokens of the expected one and 8, not 128.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from everlong.evaluation.needles import FILLER
from everlong.evaluation.tasks import TASKS, Sample, Task, filled
from everlong.evaluation.words import Drawn, number, unique_id, word_pair

_OPENING = (
    "In the notes below, secret {values} are told. Remember them: you will be asked for one at the end.\n"
)
_NEEDLE = "\nThe secret {value} of {key} is {told}."
_QUESTION = "\n\nWhat is the secret {value} of {key} in the notes above? The secret {value} of {key} is"


@dataclass(frozen=True)
class _KeyTask(Task):
    """Sentences that give a value for a key, and a question for one of them."""

    are_ids: ClassVar[bool] = False
    """Whether keys and values are UUIDs; otherwise keys are two words, and values numbers."""

    def sample(self, tokenizer: Any, length: int, *, depth: float, seed: int) -> Sample:
        """Give the value of a key at the depth."""
        keys = Drawn(f"keys, {seed}", unique_id if self.are_ids else word_pair)
        values = Drawn(f"values, {seed}", unique_id if self.are_ids else number(7))
        kind = "code" if self.are_ids else "number"
        needles: list[str] = []

        def needle(at: int) -> str:
            while len(needles) <= at:
                count = len(needles) + 1
                key, told = keys.first(count)[-1], values.first(count)[-1]
                needles.append(_NEEDLE.format(value=kind, key=key, told=told))
            return needles[at]

        def context(items: int) -> str:
            others = self.others(items, needle)
            at = round(depth * len(others))
            return _OPENING.format(values=f"{kind}s") + "".join([*others[:at], needle(0), *others[at:]])

        key, told = keys.first(1)[0], values.first(1)[0]
        question = _QUESTION.format(value=kind, key=key)
        return filled(
            self,
            tokenizer,
            length,
            context=context,
            least=1,
            question=question,
            expected=[told],
            depth=depth,
        )

    @abstractmethod
    def others(self, items: int, needle: Callable[[int], str]) -> list[str]:
        """Return what surrounds the needle that is asked for, of so many items; `needle(1)` is another."""


@TASKS.register("niah_single_1")
@dataclass(frozen=True)
class OneNeedle(_KeyTask):
    """A number for a key of two words, among sentences that say nothing."""

    def others(self, items: int, needle: Callable[[int], str]) -> list[str]:
        """Repeat the sentences."""
        return ["\n" + FILLER[item % len(FILLER)] for item in range(items)]


@TASKS.register("niah_multikey_2")
@dataclass(frozen=True)
class NeedleAmongNeedles(_KeyTask):
    """A number for a key of two words, among numbers for other such keys."""

    def others(self, items: int, needle: Callable[[int], str]) -> list[str]:
        """Give other keys."""
        return [needle(item + 1) for item in range(items)]


@TASKS.register("niah_multikey_3")
@dataclass(frozen=True)
class NeedleAmongIds(NeedleAmongNeedles):
    """A UUID for a UUID, among others."""

    are_ids: ClassVar[bool] = True
