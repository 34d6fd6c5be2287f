"""A source, cut into segments of whole sentences: what is learned at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from everlong.errors import InputError
from everlong.reading.tokens import TextCoder

_END = re.compile(
    r"(?<=[.!?…।॥؟۔])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\s\"'“‘(\[a-z])"  # before anything but a small letter
    r"|(?<=[。！？])"
    r"|\n\s*\n\s*|\n(?=\s*[-*•\d#|])|(?<=[:;{}])\n"
)
_ABBREVIATED = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|No|vs|etc|e\.g|i\.e|cf|Fig|Jr|Sr)|\b[A-Z])\.\s+$")
_FEWEST = 4  # tokens of which something can be learned
_SHATTERED, _OF_BYTES = 0.8, 0.4
"""Tokens a character, and a byte of UTF-8, of a script that a tokenizer does not know.

English has about 0.25 of both. Gemma 3, which knows it, makes 0.7 of a character of Chinese, 1 where it is
classical, and 0.24 and 0.33 of a byte; SmolLM2, which does not, 1.9 and 0.63; of Greek 0.82 and 0.45.
"""
_LONGEST = 32  # characters of a word that are taken together where a text is cut


@dataclass(frozen=True)
class Segment:
    """A stretch of the source.

    Attributes
    ----------
    number : int
        From 0 on.
    sentences : tuple of str
        Its sentences, with what stands between them; joined, they are the text.
    tokens : int
        About how many tokens it has.
    """

    number: int
    sentences: tuple[str, ...]
    tokens: int

    @property
    def text(self) -> str:
        """The text, without white space around it."""
        return "".join(self.sentences).strip()


def split_sentences(text: str) -> list[str]:
    """Split a text after its sentences, list items and paragraphs; joined, the parts are the text."""
    parts: list[str] = []
    start = 0
    for match in _END.finditer(text):
        part = text[start : match.end()]
        if not part.strip() or _ABBREVIATED.search(part):
            continue
        parts.append(part)
        start = match.end()
    if start < len(text):
        rest = text[start:]
        if parts and not rest.strip():
            parts[-1] += rest
        else:
            parts.append(rest)
    return parts


def segments(pieces: Iterable[str], coder: TextCoder, most: int) -> Iterator[Segment]:
    """Cut a text that arrives in pieces into segments; no more than one is held.

    Parameters
    ----------
    pieces : iterable of str
        The text.
    coder, most
        As of :class:`Cutter`.

    Raises
    ------
    InputError
        The text has hardly a token, or the tokenizer makes a token of nearly every character.
    """
    cutter = Cutter(coder, most)
    for piece in pieces:
        yield from cutter.feed(piece)
    last = cutter.finish()
    if cutter.tokens < _FEWEST:
        raise InputError(f"the text has {cutter.tokens} tokens: there is nothing in it to remember")
    yield from last


class Cutter:
    """Takes a text in pieces and gives the segments that are whole.

    Parameters
    ----------
    coder : TextCoder
        Counts tokens.
    most : int
        Tokens of a segment at most. A sentence that is longer is cut between words, a longer word anywhere,
        as soon as so much of it is there.
    """

    def __init__(self, coder: TextCoder, most: int) -> None:
        self._coder = coder
        self._most = most
        self._number = self._characters = self._bytes = 0
        self._held: list[tuple[str, int]] = []  # sentences, and their numbers of tokens
        self._rest = ""  # the last known sentence, which waits for its end
        self.tokens = 0
        """In all sentences so far."""

    @property
    def waiting(self) -> int:
        """Tokens taken that no segment has yet, about."""
        return sum(count for _, count in self._held) + len(self._coder.encode_after(self._rest))

    def feed(self, piece: str) -> list[Segment]:
        """Take a piece of the text; return the segments that it makes whole.

        Raises
        ------
        InputError
            The tokenizer makes a token of nearly every character.
        """
        *whole, rest = split_sentences(self._rest + piece) or [""]
        ripe, self._rest = self._ripe(rest)
        return [segment for part in (*whole, *ripe) for segment in self._put(part)]

    def finish(self) -> list[Segment]:
        """End the text; return what segments are left of it."""
        rest, self._rest = self._rest, ""
        found = list(self._put(rest)) if rest.strip() else []
        return [*found, *self._close()]

    def drop(self) -> None:
        """Forget what no segment has yet."""
        self._held, self._rest = [], ""

    def state(self) -> dict[str, Any]:
        """Return JSON-able values for :meth:`load`."""
        return {
            "number": self._number,
            "characters": self._characters,
            "bytes": self._bytes,
            "tokens": self.tokens,
            "held": self._held,
            "rest": self._rest,
        }

    def load(self, values: dict[str, Any]) -> None:
        """Take over what :meth:`state` returned."""
        self._number, self._characters = values["number"], values["characters"]
        self._bytes = values.get("bytes", self._characters)
        self.tokens, self._rest = values["tokens"], values["rest"]
        self._held = [(sentence, count) for sentence, count in values["held"]]

    def _ripe(self, rest: str) -> tuple[list[str], str]:
        """Return the parts of a sentence without an end that are cut off whatever follows, and what is left.

        Where a part ends is known from the unit behind it, and that no sentence ends there, too, once that
        unit is whole: the last one of all may not be. (A cut in a word of more than 32 letters may hide that
        it ends in an abbreviation.)
        """
        if 4 * len(rest) <= self._most:  # no character has more than four bytes, and so tokens
            return [], rest
        parts = list(_parts(_units(rest)[:-1], self._coder, self._most))
        ripe = ["".join(units) for units in parts[:-1]]
        return ripe, rest[sum(map(len, ripe)) :]

    def _put(self, sentence: str) -> Iterator[Segment]:
        for part, count in _cut(sentence, self._coder, self._most):
            self._characters += len(part)
            self._bytes += len(part.encode(errors="replace"))
            self.tokens += count
            if self._held and sum(n for _, n in self._held) + count > self._most:
                yield from self._close()
            self._held.append((part, count))
            if self.tokens >= 256 and self.tokens > max(
                _SHATTERED * self._characters, _OF_BYTES * self._bytes
            ):
                raise InputError(
                    f"the tokenizer makes {self.tokens:,} tokens of the first {self._characters:,} "
                    "characters: it does not know this script, and the model hardly the language; use a "
                    "model that was trained on it"
                )

    def _close(self) -> list[Segment]:
        """Return the segment that is held; none, if it is white space, as much as a segment has tokens."""
        held, self._held = self._held, []
        if not any(sentence.strip() for sentence, _ in held):
            return []
        self._number += 1
        sentences = tuple(sentence for sentence, _ in held)
        return [Segment(self._number - 1, sentences, sum(count for _, count in held))]


def _cut(text: str, coder: TextCoder, most: int) -> Iterator[tuple[str, int]]:
    """Yield a text in parts of at most `most` tokens, cut between words, or inside of one that is longer."""
    if 4 * len(text) <= most:
        count = len(coder.encode_after(text))
        if count <= most:
            yield text, count
            return
    for units in _parts(_units(text), coder, most):
        part = "".join(units)
        count = len(coder.encode_after(part))
        if count <= most or len(part) == 1:
            yield part, count
        else:  # one unit, or more tokens together than apart
            for half in (part[: len(part) // 2], part[len(part) // 2 :]):
                yield from _cut(half, coder, most)


def _parts(units: Sequence[str], coder: TextCoder, most: int) -> Iterator[list[str]]:
    """Yield units in runs as long as `most` tokens allow, from the first on: none depends on later units."""
    held, total = list[str](), 0
    for unit in units:
        count = len(coder.encode_after(unit))
        if held and total + count > most:
            yield held
            held, total = [], 0
        held.append(unit)
        total += count
    if held:
        yield held


def _units(text: str) -> list[str]:
    """Split a text into words, each with the white space before it, and long words into pieces."""
    return re.findall(rf"\s*\S{{1,{_LONGEST}}}|\s+$", text)
