"""A source, cut into segments of whole sentences: what is learned at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from everlong.errors import InputError
from everlong.reading.tokens import TextCoder

_END = re.compile(
    r"(?<=[.!?…])[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\s\"'“‘(\[a-z])"  # before anything but a small letter
    r"|(?<=[。！？])"
    r"|\n\s*\n\s*|\n(?=\s*[-*•\d#|])|(?<=[:;{}])\n"
)
_ABBREVIATED = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Prof|No|vs|etc|e\.g|i\.e|cf|Fig|Jr|Sr)|\b[A-Z])\.\s+$")
_FEWEST = 4  # tokens of which something can be learned
_SHATTERED = 0.8  # tokens a character; English has about 0.25


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
    coder : TextCoder
        Counts tokens.
    most : int
        Tokens of a segment at most. A sentence that is longer is cut between words, a longer word anywhere.

    Raises
    ------
    InputError
        The text has hardly a token, or the tokenizer makes a token of nearly every character.
    """
    number = characters = tokens = 0
    held: list[tuple[str, int]] = []
    for sentence, count in _counted(pieces, coder, most):
        characters, tokens = characters + len(sentence), tokens + count
        if held and sum(n for _, n in held) + count > most:
            if not _is_blank(held):
                yield _segment(number, held)
                number += 1
            held = []
        held.append((sentence, count))
        if tokens >= 256 and tokens > _SHATTERED * characters:
            raise InputError(
                f"the tokenizer makes {tokens:,} tokens of the first {characters:,} characters: it does not "
                "know this script, and the model hardly the language; use a model that was trained on it"
            )
    if tokens < _FEWEST:
        raise InputError(f"the text has {tokens} tokens: there is nothing in it to remember")
    if held and not _is_blank(held):
        yield _segment(number, held)


def _is_blank(held: list[tuple[str, int]]) -> bool:
    """Whether there is nothing but white space, as much of it as a segment has tokens."""
    return not any(sentence.strip() for sentence, _ in held)


def _segment(number: int, held: list[tuple[str, int]]) -> Segment:
    return Segment(number, tuple(sentence for sentence, _ in held), sum(count for _, count in held))


def _counted(pieces: Iterable[str], coder: TextCoder, most: int) -> Iterator[tuple[str, int]]:
    """Yield sentences with their numbers of tokens, none longer than `most`."""
    for sentence in _sentences(pieces):
        yield from _cut(sentence, coder, most)


def _cut(text: str, coder: TextCoder, most: int) -> Iterator[tuple[str, int]]:
    """Yield a text in parts of at most `most` tokens, cut between words, or inside of one that is longer."""
    count = len(coder.encode_after(text))
    if count <= most or len(text) == 1:
        yield text, count
        return
    words = re.findall(r"\s*\S+|\s+$", text)
    units = words if len(words) > 1 else list(text)
    size = -(-len(units) // (-(-count // most) + 1))
    for start in range(0, len(units), size):
        yield from _cut("".join(units[start : start + size]), coder, most)


def _sentences(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the sentences of a text that arrives in pieces; the last known one waits for its end."""
    rest = ""
    for piece in pieces:
        *whole, rest = split_sentences(rest + piece) or [""]
        yield from whole
    if rest.strip():
        yield rest
