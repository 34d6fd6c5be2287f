"""Probes: what a model is asked about a text, and whether what it wrote is an answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from everlong.errors import InputError

_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Probe:
    """A prompt and what may follow it.

    Attributes
    ----------
    prompt : str
        What the model goes on from, without a blank at the end.
    answers : tuple of str
        Any of them is right.
    form : str
        What kind of probe it is: "completion", "question", "reverse", or a task's own.
    is_exact : bool
        Whether case and punctuation count, as in a format.

    Raises
    ------
    InputError
        No answer has a word in it.
    """

    prompt: str
    answers: tuple[str, ...]
    form: str
    is_exact: bool = False

    def __post_init__(self) -> None:
        if not any(words(answer) for answer in self.answers):
            raise InputError(f"the probe {self.prompt!r} has no answer that could be recognised")


def words(text: str) -> list[str]:
    """Return the words of a text as compared: lower case, no accents, punctuation or first article."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    found = re.findall(r"\w+", "".join(c for c in letters if not unicodedata.combining(c)))
    return found[1:] if len(found) > 1 and found[0] in _ARTICLES else found


def is_answer(written: str, probe: Probe) -> bool:
    """Whether the first words written are those of an answer: the strict score.

    Of an exact probe, all that was written, as it stands.
    """
    if probe.is_exact:
        return written.strip() in probe.answers
    said = words(written)
    return any(said[: len(right)] == right for right in _right(probe.answers))


def mentions(written: str, probe: Probe) -> bool:
    """Whether an answer stands anywhere in what was written: the lenient score."""
    if probe.is_exact:
        return any(answer in written for answer in probe.answers)
    said = words(written)
    return any(
        said[at : at + len(right)] == right
        for right in _right(probe.answers)
        for at in range(len(said) - len(right) + 1)
    )


def _right(answers: Iterable[str]) -> list[list[str]]:
    return [right for right in map(words, answers) if right]
