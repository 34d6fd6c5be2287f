"""What a model is to find in long texts: the base of every task, and the registry of their names."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor

from everlong.errors import ConfigurationError
from everlong.reading.tokens import TextCoder
from everlong.registry import Registry, unknown_name


@dataclass(frozen=True, eq=False)
class Sample:
    """A long text, the question for it, and what is to be told then.

    Attributes
    ----------
    context : Tensor (n,)
        Token ids of the text, the start token included where the tokenizer puts one.
    question : Tensor (m,)
        Token ids of the question, which follows.
    expected : tuple of str
        What the answer is to contain, each of them, in upper or lower case.
    depth : float, optional
        Where it stands in the text: 0 at the beginning, 1 at the end. None: in several places.
    start : int
        Start tokens that the text begins with.
    spare : int
        Tokens that an answer may have beside those of what is expected.
    whole_words : bool
        Whether what is expected counts only where no letter or digit goes before it or follows.
    """

    context: Tensor
    question: Tensor
    expected: tuple[str, ...]
    depth: float | None = None
    start: int = 0
    spare: int = 8
    whole_words: bool = False

    def __len__(self) -> int:
        return len(self.context) + len(self.question)

    def told(self, text: str) -> float:
        """Share of what is expected that the answer `text` contains, as RULER counts."""
        edge = r"(?<!\w){}(?!\w)" if self.whole_words else "{}"
        patterns = [edge.format(re.escape(each)) for each in self.expected]
        return sum(bool(re.search(each, text, re.IGNORECASE)) for each in patterns) / len(patterns)

    def is_told(self, text: str) -> bool:
        """Whether the answer contains all of it."""
        return self.told(text) == 1

    def tokens_to_write(self, tokenizer: Any) -> int:
        """Tokens that an answer may have: twice those of what is expected, and some to spare."""
        expected = ", ".join(self.expected)
        return 2 * len(tokenizer.encode(expected, add_special_tokens=False)) + self.spare


@dataclass(frozen=True)
class Task(ABC):
    """A kind of texts with something to find. Subclass as a frozen dataclass; its fields are its options."""

    @abstractmethod
    def sample(self, tokenizer: Any, length: int, *, depth: float, seed: int) -> Sample:
        """Make one of its texts: the same for the same tokenizer, length, depth and seed.

        Parameters
        ----------
        tokenizer : transformers.PreTrainedTokenizerBase
            The model's.
        length : int
            Tokens of text and question together: exactly so many, or as many as fit.
        depth : float
            From 0 to 1: where it stands, if it stands in one place.
        seed : int
            Of what is drawn.

        Raises
        ------
        ConfigurationError
            The length is below that of the smallest text; the message says which is enough.
        """

    @property
    def label(self) -> str:
        """What tables call it: its registered name, and the options that are not the default ones."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ", ".join([TASKS.name_of(type(self)), *changed])

    @functools.cached_property
    def key(self) -> str:
        """What tells it from others of the same label, such as another text to hide something in."""
        return hashlib.sha256(f"{self.label}: {self.identity()}".encode()).hexdigest()[:12]

    def identity(self) -> str:
        """Return all that its texts depend on, beside tokenizer, length, depth and seed."""
        return repr(self)


TASKS: Registry[type[Task]] = Registry("task")


def make_task(written: str) -> Task:
    """Make a registered task from its name, with options behind colons: ``"passkey:digits=64"``.

    Raises
    ------
    UnknownNameError
        No such task, or no such option; near matches are listed.
    ConfigurationError
        A value that cannot work.
    """
    name, *options = (part.strip() for part in written.split(":"))
    kind = TASKS[name]
    hints = get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    for option in options:
        key, equals, value = (part.strip() for part in option.partition("="))
        if not equals:
            raise ConfigurationError(f"options of a task are of the form {name}:KEY=VALUE, not {option!r}")
        if key not in known:
            raise unknown_name(f"option of {name}", key, known)
        read = hints[key] if hints[key] in (int, float) else str
        try:
            values[key] = read(value)
        except ValueError:
            raise ConfigurationError(f"{name}: {key} is a number, not {value!r}") from None
    return kind(**values)


def require_numbers(task: Task, **least: float) -> None:
    """Raise unless each option that is named is at least so large."""
    for name, smallest in least.items():
        if getattr(task, name) < smallest:
            raise ConfigurationError(
                f"{TASKS.name_of(type(task))}: {name} must be at least {smallest}, not {getattr(task, name)}"
            )


def filled(
    task: Task,
    tokenizer: Any,
    length: int,
    *,
    context: Callable[[int], str],
    least: int,
    most: int | None = None,
    question: str,
    expected: Sequence[str],
    depth: float | None = None,
) -> Sample:
    """Make a text of as many items as fit into `length` tokens.

    Parameters
    ----------
    task, tokenizer, length
        Of :meth:`Task.sample`.
    context : callable
        Returns the text of so many items; with more of them it has more tokens.
    least, most : int
        Items of the smallest text, and how many there are.
    question, expected, depth
        Of the :class:`Sample`.
    """
    coder, name = TextCoder(tokenizer), task.label
    asked = coder.encode_after(question)
    room = length - len(coder.bos) - len(asked)

    @functools.lru_cache(maxsize=2)
    def ids(items: int) -> list[int]:
        return coder.encode(context(items))

    if len(ids(least)) > room:
        needed = len(ids(least)) + length - room
        raise ConfigurationError(
            f"{name} does not fit into {length:,} tokens: at least {needed:,} are needed; use more"
        )
    items = largest(lambda count: len(ids(count)), room, least, most)
    if items == most:
        raise ConfigurationError(
            f"{name} runs out of words at {len(ids(items)) + length - room:,} tokens of {length:,}; "
            "use a smaller length, or have each word more often"
        )
    start = len(coder.bos)
    return Sample(torch.tensor([*coder.bos, *ids(items)]), torch.tensor(asked), tuple(expected), depth, start)


def largest(size: Callable[[int], int], room: int, least: int, most: int | None = None) -> int:
    """Return the largest count, from `least` to `most`, whose size is at most `room`; that of `least` is.

    Sizes grow about evenly, so that a few of them are enough: each guess lies on the line between the largest
    count known to fit and the smallest known not to, and every other one halfway.
    """
    low, below = least, size(least)
    high, above = low, below
    while above <= room:
        if high == most:
            return high
        low, below = high, above
        high = 2 * high + 1 if most is None else min(2 * high + 1, most)
        above = size(high)
    is_halfway = False
    while high - low > 1:
        step = (high - low) // 2 if is_halfway else (high - low) * (room - below) // max(1, above - below)
        middle = min(max(low + step, low + 1), high - 1)
        if (found := size(middle)) <= room:
            low, below = middle, found
        else:
            high, above = middle, found
        is_halfway = not is_halfway
    return low
