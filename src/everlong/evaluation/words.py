"""Random words, names and numbers that tasks are made of: each new, and the same for the same seed."""

from __future__ import annotations

import functools
import itertools
import random
import string
import uuid
from collections.abc import Callable

from everlong.errors import ConfigurationError

_MANY = 10_000
"""Draws in a row that find nothing new, after which there is nothing left."""


class Drawn:
    """Values that are drawn when they are asked for, no two alike.

    Parameters
    ----------
    seed : str
        Of the draws; a longer list begins as a shorter one.
    draw : callable
        Draws one.
    """

    def __init__(self, seed: str, draw: Callable[[random.Random], str]) -> None:
        self._random = random.Random(seed)
        self._draw = draw
        self._values: list[str] = []
        self._known: set[str] = set()

    def first(self, count: int) -> list[str]:
        """Return the first `count` of them.

        Raises
        ------
        ConfigurationError
            There are not so many.
        """
        while len(self._values) < count:
            value = next(self._new(), None)
            if value is None:
                raise ConfigurationError(
                    f"only {len(self._values):,} different words of {count:,} were found; use fewer"
                )
            self._known.add(value)
            self._values.append(value)
        return self._values[:count]

    def _new(self) -> itertools.filterfalse[str]:
        draws = (self._draw(self._random) for _ in range(_MANY))
        return itertools.filterfalse(self._known.__contains__, draws)


@functools.cache
def word_list(*kinds: str) -> tuple[str, ...]:
    """Return English words of these kinds, sorted; ``"noun"``, ``"adjective"`` and ``"verb"`` are.

    Raises
    ------
    ConfigurationError
        The package wonderwords is not installed.
    """
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ConfigurationError(
            "this task is made of English words from the package wonderwords, which is not installed: "
            "pip install 'everlong[bench]', or do without niah_single_1, niah_multikey_2 and cwe"
        ) from error
    found = RandomWord().filter(include_categories=kinds)
    return tuple(sorted({word.lower() for word in found if word.isalpha() and word.isascii()}))


def common_word(draws: random.Random) -> str:
    """Draw a noun, an adjective or a verb."""
    return draws.choice(word_list("noun", "adjective", "verb"))


def known_words() -> int:
    """Return how many words :func:`common_word` draws from."""
    return len(word_list("noun", "adjective", "verb"))


def word_pair(draws: random.Random) -> str:
    """Draw an adjective and a noun, joined; of six million, which are never listed."""
    return f"{draws.choice(word_list('adjective'))}-{draws.choice(word_list('noun'))}"


def unique_id(draws: random.Random) -> str:
    """Draw a UUID."""
    return str(uuid.UUID(int=draws.getrandbits(128), version=4))


def number(digits: int) -> Callable[[random.Random], str]:
    """Return what draws a number of so many digits."""
    return lambda draws: str(draws.randrange(10 ** (digits - 1), 10**digits))


def letters(count: int, alphabet: str = string.ascii_lowercase) -> Callable[[random.Random], str]:
    """Return what draws a word of so many letters that means nothing."""
    return lambda draws: "".join(draws.choice(alphabet) for _ in range(count))
