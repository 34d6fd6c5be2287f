"""RULER's variable tracking: which names hold a value, some of them only by way of others.

Hsieh et al. 2024, arXiv 2404.06654, section 3 (multi-hop tracing). One or several chains of assignments stand
in order among sentences that say nothing, and all names of one chain are asked for, after a short example of
the same form. Different here: the wording and the sentences; a text has as many sentences as fit; an answer
may have twice the tokens of the expected one and 8, not 30.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Any

from everlong.evaluation.needles import FILLER
from everlong.evaluation.tasks import TASKS, Sample, Task, filled, require_numbers
from everlong.evaluation.words import Drawn, letters, number

_EXAMPLE_SENTENCES = 5
_OPENING = "Below, variables are set, some to a number and some to another variable. Follow them.\n\n"
_QUESTION = (
    "\n\nQuestion: Which variables hold {value}, whether directly or by way of others?\n"
    "Answer: {count} variables hold {value}, namely"
)


@TASKS.register("vt")
@dataclass(frozen=True)
class VariableTracking(Task):
    """Names that hold a number, directly or by way of others.

    Parameters
    ----------
    chains : int
        Numbers, each with names of its own; 1 in RULER's thirteen tasks. One is asked for.
    hops : int
        Assignments of a name to a name in each chain; 4 there.
    """

    chains: int = 1
    hops: int = 4

    def __post_init__(self) -> None:
        require_numbers(self, chains=1, hops=1)

    def sample(self, tokenizer: Any, length: int, *, depth: float, seed: int) -> Sample:
        """Set the names of each chain, in order, at random places."""
        every = 2 * self.chains  # the example has as many
        names = Drawn(f"names, {seed}", letters(5, string.ascii_uppercase)).first(every * (self.hops + 1))
        values = Drawn(f"values, {seed}", number(5)).first(every)
        groups = [names[start : start + self.hops + 1] for start in range(0, len(names), self.hops + 1)]
        half, draws = self.chains, random.Random(f"example, {seed}")
        shown = self._text(groups[half:], values[half:], _EXAMPLE_SENTENCES, draws)
        example = f"{shown}{self._question(values[half])} {', '.join(groups[half])}.\n\n"

        def context(items: int) -> str:
            places = random.Random(f"places, {seed}, {items}")
            return _OPENING + example + self._text(groups[:half], values[:half], items, places)

        question = self._question(values[0])
        return filled(
            self, tokenizer, length, context=context, least=1, question=question, expected=groups[0]
        )

    def _question(self, value: str) -> str:
        return _QUESTION.format(value=value, count=self.hops + 1)

    def _text(self, groups: list[list[str]], values: list[str], sentences: int, draws: random.Random) -> str:
        """Put the assignments of each chain, in order, between so many sentences."""
        slots: list[list[str]] = [[] for _ in range(sentences + 1)]
        for group, value in zip(groups, values, strict=True):
            chosen = sorted(draws.choices(range(sentences + 1), k=len(group)))
            for slot, name, held in zip(chosen, group, [value, *group[:-1]], strict=True):
                slots[slot].append(f"LET {name} = {held}.")
        lines = [*slots[0]]
        for at in range(sentences):
            lines += [FILLER[at % len(FILLER)], *slots[at + 1]]
        return "\n".join(lines)
