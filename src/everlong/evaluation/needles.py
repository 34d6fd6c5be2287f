"""Something hidden in a long text, to be told at its end: a passkey, or a sentence of one's own."""

from __future__ import annotations

import hashlib
import os
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from everlong.errors import ConfigurationError, InputError
from everlong.evaluation.tasks import TASKS, Sample, Task, require_numbers
from everlong.evaluation.texts import LIBRARY, haystack, regular_file
from everlong.reading.tokens import TextCoder

FILLER = (
    "Rain fell on the hills and the river rose.",
    "A cart went by on the road.",
    "The wind turned to the west.",
    "Somebody closed a window.",
    "It was evening, and later it was morning again.",
)
"""Sentences that say nothing."""

_OPENING = (
    "Somewhere in the notes below a passkey is written down. Everything else is of no account. "
    "Look for the passkey and remember it: you will be asked for it at the end.\n\n"
)
_NEEDLE = "The passkey is {key}. Remember it. {key} is the passkey. "
PASSKEY_QUESTION = "Which number is the passkey?"
"""What is asked: for a number, since "What is the passkey?" may be taken for a question about the word."""

_ASKED = "{question} The passkey is"
_LEAD = "The lighthouse keeper of Tarnmouth hides her spare key under the"
_READ = "Read the text below. At its end you will be asked about one sentence of it.\n\n"


@dataclass(frozen=True, eq=False)
class Needle(Sample):
    """A long text with one thing in it, which the answer is to begin with, word for word."""

    @property
    def answer(self) -> str:
        """What is to be written."""
        return self.expected[0]

    def is_told(self, text: str) -> bool:
        """Whether what was written begins with the answer, and no other digit follows."""
        told = text.lstrip()
        return told.startswith(self.answer) and not told[len(self.answer) :][:1].isdigit()

    def told(self, text: str) -> float:
        """Share of the answer that what was written begins with."""
        return len(os.path.commonprefix([text.lstrip(), self.answer])) / len(self.answer)

    def tokens_to_write(self, tokenizer: Any) -> int:
        """Those of the answer, and a few."""
        return len(tokenizer.encode(self.answer, add_special_tokens=False)) + 4


@dataclass(frozen=True)
class _HiddenTask(Task):
    """What hides something in a text, which a file or Python's own sources may be."""

    text: str | None = None

    def identity(self) -> str:
        """Return the options, and what stands in the file."""
        if self.text is None:
            return repr(self)
        if self.text == LIBRARY:
            return f"{self!r}, Python {platform.python_version()}"
        with regular_file(self.text).open("rb") as file:
            return f"{self!r}, {hashlib.file_digest(file, 'sha256').hexdigest()}"

    def haystack(self, tokenizer: Any, length: int) -> list[int] | None:
        """Return the first `length` tokens of the text."""
        if self.text is None:
            return None
        ids: list[int] = haystack(tokenizer, self.text, length).ids.tolist()
        return ids


def _named(text: str | None) -> str:
    """Say which file of one's own something is hidden in."""
    return "" if text is None or text == LIBRARY else f" ({Path(text).name})"


@TASKS.register("passkey")
@dataclass(frozen=True)
class Passkey(_HiddenTask):
    """A number, to be told whole; see :func:`passkey`.

    Parameters
    ----------
    text : str, optional
        A file to hide it in; ``"library"``: Python's own sources. None: sentences that say nothing.
    digits : int
        7 in most papers; 64 show damage that 7 hide.
    question : str
        What is asked at the end, before "The passkey is".
    """

    digits: int = 7
    question: str = PASSKEY_QUESTION

    def __post_init__(self) -> None:
        require_numbers(self, digits=1)

    @property
    def label(self) -> str:
        """Say how many digits it has, and what is asked if it is another question."""
        asked = "" if self.question == PASSKEY_QUESTION else f', asked "{self.question}"'
        return f"passkey of {self.digits} digits{_named(self.text)}{asked}"

    @property
    def asked(self) -> str:
        """What stands behind the text: the question, and how the answer begins."""
        return _ASKED.format(question=self.question)

    def sample(self, tokenizer: Any, length: int, *, depth: float, seed: int) -> Needle:
        """Hide another passkey."""
        return passkey(
            tokenizer,
            length,
            depth=depth,
            digits=self.digits,
            question=self.question,
            seed=seed,
            haystack=self.haystack(tokenizer, length),
        )


@TASKS.register("niah")
@dataclass(frozen=True)
class SentenceInText(_HiddenTask):
    """A sentence in a text of one's own, and a question that it answers.

    The same sentence stands in every text, at other depths. An answer counts that contains what is expected.

    Parameters
    ----------
    text : str
        The file to hide it in; ``"library"``: Python's own sources.
    needle : str
        The sentence.
    question : str
        What is asked at the end.
    answer : str
        What the model's answer is to contain.
    lead : str, optional
        How the answer begins, which the model is given: small ones go on with a text rather than answer a
        question about it. By default nothing, but for the sentence that is the default.
    """

    text: str | None = LIBRARY
    needle: str = "The lighthouse keeper of Tarnmouth hides her spare key under the blue flowerpot."
    question: str = "Where does the lighthouse keeper of Tarnmouth hide her spare key?"
    answer: str = "blue flowerpot"
    lead: str | None = None

    def __post_init__(self) -> None:
        for name in ("text", "needle", "question", "answer"):
            if not (getattr(self, name) or "").strip():
                raise ConfigurationError(f"niah: {name} is empty; a needle, its question and its answer are")

    @property
    def label(self) -> str:
        """Say which needle it is, if it is another one."""
        needle = "niah" if self.needle == type(self).needle else f"niah: {self.needle}"
        return f"{needle}{_named(self.text)}"

    def sample(self, tokenizer: Any, length: int, *, depth: float, seed: int) -> Sample:
        """Hide the sentence."""
        coder = TextCoder(tokenizer)
        haystack = self.haystack(tokenizer, length) or []
        lead = (_LEAD if self.needle == type(self).needle else "") if self.lead is None else self.lead
        context, question, at = hidden(
            coder,
            length,
            opening=_READ,
            needle=f"\n\n{self.needle}\n\n",
            question=f"\n\nQuestion: {self.question}\nAnswer: {lead}".rstrip(),
            haystack=haystack,
            depth=depth,
            what="this sentence, with its question,",
        )
        spare = len(coder.encode(self.needle)) + 8  # the sentence may be said again before its point
        ids = torch.tensor(context), torch.tensor(question)
        return Sample(*ids, (self.answer,), at, len(coder.bos), spare, whole_words=True)


def passkey(
    tokenizer: Any,
    length: int,
    *,
    depth: float,
    digits: int = 7,
    question: str = PASSKEY_QUESTION,
    seed: int = 0,
    haystack: Sequence[int] | None = None,
) -> Needle:
    """Hide a passkey (Mohtashami and Jaggi, 2023; wording of our own).

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    length : int
        Tokens of text and question together: exactly so many.
    depth : float
        From 0 to 1: where it stands; in the filler between two rounds of it.
    digits : int
        Of the passkey; 7 in most papers. 64 show damage that 7 hide.
    question : str
        What is asked at the end, before "The passkey is".
    seed : int
        Of the passkey's digits.
    haystack : sequence of int, optional
        Token ids of a text to hide it in, from its beginning, instead of the filler. Start tokens are left
        out.

    Raises
    ------
    ConfigurationError
        The length is too small to hold the question and the passkey, or the depth is not in a text.
    InputError
        The text to hide it in is too short.
    """
    if digits < 1 or not 0 <= depth <= 1:
        raise ConfigurationError(f"a passkey has at least one digit and a depth from 0 to 1, not {depth}")
    if not question.strip():
        raise ConfigurationError("the question is empty; it is what the text is asked at its end")
    draws = random.Random(f"{seed}, {digits}")
    key = "".join(draws.choice("0123456789") for _ in range(digits))
    coder = TextCoder(tokenizer)
    told = _NEEDLE.format(key=key)
    context, asked, at = hidden(
        coder,
        length,
        opening=_OPENING,
        needle=told if haystack is None else f"\n\n{told}\n\n",
        question="\n\n" + _ASKED.format(question=question),
        haystack=haystack,
        depth=depth,
        what=f"a passkey of {digits} digits",
    )
    return Needle(torch.tensor(context), torch.tensor(asked), (key,), at, len(coder.bos))


def hidden(
    coder: TextCoder,
    length: int,
    *,
    opening: str,
    needle: str,
    question: str,
    haystack: Sequence[int] | None,
    depth: float,
    what: str,
) -> tuple[list[int], list[int], float]:
    """Return the ids of a text with `needle` in it, those of the question, and where the needle stands.

    Both together have exactly `length` tokens; `what` the needle is, errors say.
    """
    begun = [*coder.bos, *coder.encode(opening)]
    told, asked = coder.encode_after(needle), coder.encode_after(question)
    unit = coder.encode_after("".join(f"{sentence} " for sentence in FILLER))
    room = length - len(begun) - len(told) - len(asked)
    if room < len(unit):
        least = length - room + len(unit)
        raise ConfigurationError(f"{what} does not fit into {length} tokens: at least {least} are needed")
    if haystack is not None and list(haystack[: len(coder.bos)]) == list(coder.bos):
        haystack = haystack[len(coder.bos) :]
    filler = (unit * (room // len(unit) + 1) if haystack is None else list(haystack))[:room]
    if len(filler) < room:
        raise InputError(
            f"a text of {len(filler):,} tokens is too short to hide {what} in {length:,}; use a longer text"
        )
    at = round(depth * room) if haystack is not None else round(depth * (room // len(unit))) * len(unit)
    return [*begun, *filler[:at], *told, *filler[at:]], asked, at / room
