"""Guesses at what comes next, run with the last token: right ones save a step, wrong ones cost little.

A guess never changes what is written: each token is chosen from the model's own logits, and guesses are
kept as far as they equal what was chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from everlong.registry import Registry


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, in one way or in several.

    Attributes
    ----------
    tokens : sequence of int
        The guessed tokens; none: nothing is known.
    parents : sequence of int or None
        Of each, the number of the one it follows: 0 is the last token written, i the i-th of `tokens`; None:
        each follows the one before.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] | None = None


class Speculator(ABC):
    """Guesses the next tokens of one stream."""

    branches: ClassVar[bool] = False
    """Whether it guesses in several ways at once, which not every policy can run."""

    @abstractmethod
    def __init__(self, read: Iterable[int]) -> None:
        """Begin after the tokens `read`, oldest first."""

    @abstractmethod
    def add(self, token: int) -> None:
        """Take note of the next token."""

    @abstractmethod
    def guess(self) -> Draft:
        """Return what may come next."""

    @abstractmethod
    def judged(self, kept: int, logits: Tensor) -> None:
        """Take note of what became of the latest draft, before its tokens are added.

        Parameters
        ----------
        kept : int
            How many of its tokens were right, one after another.
        logits : Tensor
            After the last token written and after each of the draft's, shape (1 + tokens, vocabulary).
        """


SPECULATORS: Registry[type[Speculator]] = Registry("way to speculate")


@SPECULATORS.register("prompt-lookup")
class PromptLookup(Speculator):
    """Prompt lookup (Saxena 2023; ``prompt_lookup_num_tokens`` in transformers): the text repeats itself.

    If the last three tokens, or two, occurred before, what followed them then is the guess. It grows
    while guesses are right, and shrinks when they are not.

    Parameters
    ----------
    read : iterable of int
        Tokens to look back into, besides those that are added.
    """

    SIZES = (3, 2)
    """Tokens that must match, the longest first."""
    SHORTEST, LONGEST = 2, 16
    """Tokens of a guess."""

    def __init__(self, read: Iterable[int]) -> None:
        self._tokens: list[int] = []
        self._after: dict[
            tuple[int, ...], tuple[int, int]
        ] = {}  # where an n-gram last ended, and before that
        self._length = 2 * self.SHORTEST
        self._given = 0  # tokens of the latest guess
        for token in read:
            self.add(token)

    def add(self, token: int) -> None:
        """Remember where each n-gram ends."""
        self._tokens.append(token)
        end = len(self._tokens)
        for size in self.SIZES:
            if end >= size:
                gram = tuple(self._tokens[end - size :])
                self._after[gram] = (end, self._after.get(gram, (0, 0))[0])

    def guess(self) -> Draft:
        """Return what followed the last tokens when they occurred before."""
        for size in self.SIZES:
            _, earlier = self._after.get(tuple(self._tokens[-size:]), (0, 0))
            if earlier:
                guess = self._tokens[earlier : earlier + self._length]
                self._given = len(guess)
                return Draft(guess)
        return Draft()

    def judged(self, kept: int, logits: Tensor) -> None:
        """Double the guess's length where all of it was right, halve it where none was."""
        if kept >= self._given:
            self._length = min(2 * self._length, self.LONGEST)
        elif not kept:
            self._length = max(self._length // 2, self.SHORTEST)
