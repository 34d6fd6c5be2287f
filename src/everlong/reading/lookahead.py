"""Lookahead decoding: the model guesses its own next tokens, beside the step that it takes anyway."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from everlong.reading.speculation import SPECULATORS, Draft, Speculator


@SPECULATORS.register("lookahead")
class Lookahead(Speculator):
    """Lookahead decoding (Fu, Bailis, Stoica, Zhang 2024, arXiv 2402.02057).

    Every step runs three things at once: the last token; a window of tokens to come, guessed wrongly at first
    and made better from step to step (Jacobi iteration); and n-grams that such windows have passed through
    before, as guesses. The window's token in level l and column w stands w + l positions ahead and follows
    its column's tokens of earlier levels, and the first level up to that column. What a column passes
    through in `LEVELS` steps is an n-gram, and goes to the pool; n-grams of the text itself go there too.

    It runs some 56 tokens a step: worth it where a forward of many tokens costs little more than one of a
    single token, as on a GPU.

    Parameters
    ----------
    read : iterable of int
        Tokens whose n-grams begin the pool.
    """

    LEVELS, WINDOW, GUESSES = 5, 7, 7
    """N, W and G of the paper: length of the n-grams, columns, n-grams verified in a step."""

    branches: ClassVar[bool] = True

    def __init__(self, read: Iterable[int]) -> None:
        self._random = random.Random(0)
        self._text: deque[int] = deque(maxlen=256)
        self._pool: dict[int, dict[tuple[int, ...], None]] = {}
        self._levels: list[list[int]] = []
        self._last_level: list[int] = []  # numbers, in the latest draft, of the last level's tokens
        for token in read:
            self.add(token)

    def add(self, token: int) -> None:
        """Remember the n-gram that ends here."""
        self._text.append(token)
        if len(self._text) >= self.LEVELS:
            self._remember([self._text[at] for at in range(-self.LEVELS, 0)])

    def guess(self) -> Draft:
        """Return the window, and the pool's latest n-grams that begin with the last token."""
        if not self._text:
            return Draft()
        if not self._levels:
            self._levels = [[self._any() for _ in range(self.WINDOW)] for _ in range(self.LEVELS - 1)]
        self._levels[0][0] = last = self._text[-1]
        tokens: list[int] = []
        parents: list[int] = []
        numbers: dict[tuple[int, int], int] = {}

        def follow(parent: int, token: int) -> int:
            """Let `token` follow `parent`, if it does not yet, and return its number."""
            if (parent, token) not in numbers:
                tokens.append(token)
                parents.append(parent)
                numbers[parent, token] = len(tokens)
            return numbers[parent, token]

        column = [0]
        for token in self._levels[0][1:]:
            column.append(follow(column[-1], token))
        for level in self._levels[1:]:
            column = [follow(above, token) for above, token in zip(column, level, strict=True)]
        self._last_level = column
        for ngram in reversed(self._pool.get(last, {})):
            at = 0
            for token in ngram:
                at = follow(at, token)
        return Draft(tokens, parents)

    def judged(self, kept: int, logits: Tensor) -> None:
        """Move the window on: a level, by what followed its last one, and a column for each right guess."""
        found = logits[self._last_level].argmax(-1).tolist()
        for ngram in zip(*self._levels, found, strict=True):
            self._remember(list(ngram))
        self._levels = [*self._levels[1:], found]
        ahead = min(kept, self.WINDOW)
        self._levels = [level[ahead:] + [self._any() for _ in range(ahead)] for level in self._levels]

    def _remember(self, ngram: list[int]) -> None:
        """Put an n-gram into the pool; of those with its first token, the latest `GUESSES` stay."""
        following = self._pool.setdefault(ngram[0], {})
        following.pop(tuple(ngram[1:]), None)
        following[tuple(ngram[1:])] = None
        if len(following) > self.GUESSES:
            del following[next(iter(following))]

    def _any(self) -> int:
        return self._random.choice(self._text)
