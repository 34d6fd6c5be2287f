"""RULER's two tasks of counting: words that stand in a list most often, and made-up words that do in a text.

Hsieh et al. 2024, arXiv 2404.06654, section 3 (aggregation). Different here: the wording; a list has as many
words as fit; the example before it always has each common word three times and each other once (there, longer
lists have a longer example); made-up words are as many as the distribution gives one each (there, a fiftieth
of the length); an answer may have twice the tokens of the expected one and 8, not 120 and 50.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from everlong.errors import ConfigurationError
from everlong.evaluation.tasks import TASKS, Sample, Task, filled, require_numbers
from everlong.evaluation.words import Drawn, common_word, known_words, letters

_LIST = "Below is a numbered list of words. Some of them stand in it much more often than the others.\n\n"
_LIST_QUESTION = (
    "\n\nQuestion: Which {count} words stand in the list most often?\n"
    "Answer: The {count} words that stand in the list most often are"
)
_CODED = "Below is a text in code. Mind how often each of its words occurs.\n\n"
_CODED_QUESTION = (
    "\n\nQuestion: Leave the dots aside. Which three words occur most often in the text in code?\n"
    "Answer: The three words that occur most often are"
)
_DOTS = "......"
_FIRST_TERMS = 1000  # of the zeta function, that are added one by one


@TASKS.register("cwe")
@dataclass(frozen=True)
class CommonWords(Task):
    """The words that stand in a list most often.

    Parameters
    ----------
    words : int
        How many are common; 10 in RULER.
    repeats : int
        How often each of them stands in the list; 30 there.
    others : int
        How often each other word does; 3 there.
    """

    words: int = 10
    repeats: int = 30
    others: int = 3

    def __post_init__(self) -> None:
        require_numbers(self, words=1, others=1, repeats=self.others + 1)

    def sample(self, tokenizer: Any, length: int, *, depth: float, seed: int) -> Sample:
        """List the common words, and as many others as fit."""
        drawn = Drawn(f"words, {seed}", common_word)
        rare = 3 * self.words
        common, *example = (
            drawn.first(rare)[start : start + self.words] for start in range(0, rare, self.words)
        )
        shown = _numbered([*example[0] * 3, *example[1]], random.Random(f"example, {seed}"))
        question = _LIST_QUESTION.format(count=self.words)
        told = " ".join(f"{at}. {word}" for at, word in enumerate(example[0], 1))
        opening = f"{_LIST}{shown}{question} {told}\n\n{_LIST}"

        def context(items: int) -> str:
            others = drawn.first(rare + items)[rare:]
            every = [*common * self.repeats, *others * self.others]
            return opening + _numbered(every, random.Random(f"order, {seed}, {items}"))

        return filled(
            self,
            tokenizer,
            length,
            context=context,
            least=1,
            # The last tenth of the words is not asked for: it would be drawn over and over.
            most=max(2, known_words() * 9 // 10 - rare),
            question=question,
            expected=common,
        )


@TASKS.register("fwe")
@dataclass(frozen=True)
class FrequentWords(Task):
    """The made-up words that occur most often in a text, whose frequencies follow Zipf's law.

    Parameters
    ----------
    alpha : float
        The word of rank k occurs in proportion to k to the power of minus alpha; 2 in RULER, above 1. The
        first rank is that of dots, which are not asked for.
    letters : int
        Of a word; 6 there.
    """

    alpha: float = 2.0
    letters: int = 6

    def __post_init__(self) -> None:
        require_numbers(self, letters=4)
        if not 1.1 <= self.alpha <= 5:
            raise ConfigurationError(f"fwe: alpha must be from 1.1 to 5, not {self.alpha}")

    def sample(self, tokenizer: Any, length: int, *, depth: float, seed: int) -> Sample:
        """Write as many words as fit."""
        drawn = Drawn(f"coded, {seed}", letters(self.letters))
        zeta = _zeta(self.alpha)

        def context(items: int) -> str:
            # From this rank on less than half an occurrence is due.
            ranks = int((2 * items / zeta) ** (1 / self.alpha)) + 1
            words = [_DOTS, *drawn.first(ranks - 1)]
            counts = [round(items / zeta * rank**-self.alpha) for rank in range(1, ranks + 1)]
            every = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
            random.Random(f"order, {seed}, {items}").shuffle(every)
            return _CODED + " ".join(every)

        # So many words, and the fourth rank occurs more often than the fifth.
        least = math.ceil(zeta / (4**-self.alpha - 5**-self.alpha)) + 1
        return filled(
            self,
            tokenizer,
            length,
            context=context,
            least=least,
            question=_CODED_QUESTION,
            expected=drawn.first(3),
        )


def _numbered(words: list[str], draws: random.Random) -> str:
    draws.shuffle(words)
    return "\n".join(f"{at}. {word}" for at, word in enumerate(words, 1))


def _zeta(alpha: float) -> float:
    """Return Riemann's zeta function at `alpha` > 1: its first terms, and Euler and Maclaurin's rest."""
    first = sum(rank**-alpha for rank in range(1, _FIRST_TERMS))
    return float(first + _FIRST_TERMS ** (1 - alpha) / (alpha - 1) + _FIRST_TERMS**-alpha / 2)
