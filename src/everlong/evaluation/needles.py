"""Something hidden in a long text, to be told at its end: a passkey among sentences that say nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from everlong.errors import ConfigurationError, InputError
from everlong.reading.tokens import TextCoder

_OPENING = (
    "Somewhere in the notes below a passkey is written down. Everything else is of no account. "
    "Look for the passkey and remember it: you will be asked for it at the end.\n\n"
)
_FILLER = (
    "Rain fell on the hills and the river rose. A cart went by on the road. The wind turned to the west. "
    "Somebody closed a window. It was evening, and later it was morning again. "
)
_NEEDLE = "The passkey is {key}. Remember it. {key} is the passkey. "
_QUESTION = "\n\nWhat is the passkey? The passkey is"


@dataclass(frozen=True, eq=False)
class Needle:
    """A long text with something in it, and the question for it.

    Attributes
    ----------
    context : Tensor (n,)
        Token ids of the text, the start token included where the tokenizer puts one.
    question : Tensor (m,)
        Token ids of the question, which follows.
    answer : str
        What is to be written then, word for word.
    depth : float
        Where it stands in the text: 0 at the beginning, 1 at the end.
    start : int
        Start tokens that the text begins with.
    """

    context: Tensor
    question: Tensor
    answer: str
    depth: float
    start: int = 0

    def __len__(self) -> int:
        return len(self.context) + len(self.question)

    def is_told(self, text: str) -> bool:
        """Whether what was written begins with the answer, and no other digit follows."""
        told = text.lstrip()
        return told.startswith(self.answer) and not told[len(self.answer) :][:1].isdigit()

    def told(self, text: str) -> float:
        """Share of the answer that what was written begins with."""
        return len(os.path.commonprefix([text.lstrip(), self.answer])) / len(self.answer)


def passkey(
    tokenizer: Any,
    length: int,
    *,
    depth: float,
    digits: int = 7,
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
    draws = random.Random(f"{seed}, {digits}")
    key = "".join(draws.choice("0123456789") for _ in range(digits))
    coder = TextCoder(tokenizer)
    opening = [*coder.bos, *coder.encode(_OPENING)]
    told = _NEEDLE.format(key=key) if haystack is None else f"\n\n{_NEEDLE.format(key=key)}\n\n"
    needle, question = coder.encode_after(told), coder.encode_after(_QUESTION)
    unit = coder.encode_after(_FILLER)
    room = length - len(opening) - len(needle) - len(question)
    if room < len(unit):
        least = length - room + len(unit)
        raise ConfigurationError(
            f"a passkey of {digits} digits does not fit into {length} tokens: at least {least} are needed"
        )
    if haystack is not None and list(haystack[: len(coder.bos)]) == list(coder.bos):
        haystack = haystack[len(coder.bos) :]
    filler = (unit * (room // len(unit) + 1) if haystack is None else list(haystack))[:room]
    if len(filler) < room:
        raise InputError(f"a text of {len(filler):,} tokens is too short to hide a passkey in {length:,}")
    at = round(depth * room) if haystack is not None else round(depth * (room // len(unit))) * len(unit)
    context = [*opening, *filler[:at], *needle, *filler[at:]]
    return Needle(torch.tensor(context), torch.tensor(question), key, at / room, len(coder.bos))
