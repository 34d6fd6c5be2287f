"""What may be asked about a segment: generators of pairs, an open set."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from everlong.errors import InputError
from everlong.memory.lessons import Elicited
from everlong.memory.pairs import Pair
from everlong.memory.segments import Segment
from everlong.memory.writer import Writer
from everlong.registry import Registry

GENERATORS: Registry[type[Generator]] = Registry("generator of pairs")
"""All generators, by name."""

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Letters of scripts that put no blanks between words: three of them count as one."""
WORD = re.compile(rf"\s*(?:[{_UNSPACED}]{{1,3}}|[^\s{_UNSPACED}]+)")
"""A word, with the blanks before it."""
_LETTERS = re.compile(r"[^\W_]+")


class Generator:
    """Makes pairs of one kind from a segment; register it with ``@GENERATORS.register(name)``."""

    name: ClassVar[str]

    def elicit(self, segment: Segment, writer: Writer) -> Iterator[Elicited]:
        """Yield pairs about `segment`; what has to be written for them, `writer` writes."""
        raise NotImplementedError

    def answers(self, pairs: Sequence[Pair], text: str, writer: Writer) -> list[str] | None:
        """Return what `writer` answers to pairs of this kind, reading a text, which may be empty.

        None: these pairs ask nothing that the text tells.
        """
        return None


@GENERATORS.register("cloze")
@dataclass(frozen=True)
class Cloze(Generator):
    """The text's own sentences: how one begins is the query, how it goes on the response.

    Needs no model that follows instructions. Each sentence is learned by itself, and behind the one before
    it, so that what it refers to is known; the teacher reads the whole segment. Where a line ends with the
    sentence, that is learned too: without it a list goes on and on.

    Parameters
    ----------
    begin : int
        Words of a sentence that make up the query.
    """

    name: ClassVar[str] = "cloze"
    begin: int = 1

    def elicit(self, segment: Segment, writer: Writer) -> Iterator[Elicited]:
        """Yield up to two pairs a sentence."""
        beginning = segment.text + "\n\n"
        previous = ""
        for number, raw in enumerate(segment.sentences):
            begun = raw.lstrip()
            sentence = begun.rstrip()
            target = begun if "\n" in begun[len(sentence) :] else sentence
            words = WORD.findall(sentence)
            if len(words) > self.begin:
                query = "".join(words[: self.begin])
                for before in ("", previous) if previous else ("",):
                    pair = Pair(before + query, target[len(query) :], self.name, segment.number, (number,))
                    yield Elicited(pair, beginning, pair.query)
                previous = begun
            elif words:
                previous += raw


@GENERATORS.register("text")
@dataclass(frozen=True)
class Text(Generator):
    """The text as it stands, nothing asked: next-token training, as Temp-LoRA does it."""

    name: ClassVar[str] = "text"

    def elicit(self, segment: Segment, writer: Writer) -> Iterator[Elicited]:
        """Yield one pair, with an empty query."""
        pair = Pair("", segment.text, self.name, segment.number, tuple(range(len(segment.sentences))))
        yield Elicited(pair, segment.text + "\n\n", "")


def plain(text: str) -> str:
    """Return the words of a text, small, with a blank around each; empty: it has none."""
    words = _LETTERS.findall(text.lower())
    return f" {' '.join(words)} " if words else ""


def make_generators(names: Sequence[str]) -> list[Generator]:
    """Return generators by their names.

    Raises
    ------
    UnknownNameError
        There is none of that name.
    InputError
        There is no name.
    """
    if not names:
        raise InputError(f"at least one generator is needed: {', '.join(GENERATORS)}")
    return [GENERATORS[name]() for name in names]
