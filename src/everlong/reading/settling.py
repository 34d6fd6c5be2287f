"""Where a text can be cut so that both sides, tokenised apart, give the tokens of the whole.

Tokens depend on what follows: ``un`` becomes ``unless``, two blanks before a word are cut differently from
three, an accent joins the letter before it. But a byte-pair encoding cut at the end of one of its tokens is
the encoding of each side, and the token that reaches over the end of the text so far cannot begin earlier
than the longest token is long. So a cut is safe if the sides agree with the whole for the text stopped at
each of its last characters; and because words are split by patterns that look ahead, also for the text going
on in several ways. This is checked with the tokenizer itself, so it holds for tokenizers of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

_REACH = 128  # characters before the tail in which a cut is looked for
_CONTEXT = 128  # characters before those, so that the tokens are in step
_WORD_ENDS = 8  # ends of words tried before other places
_TOO_LONG = 65_536  # characters after which a cut that only seems safe is taken, to stay bounded
_CONTINUATIONS = (
    *("a", "S", "1", " ", "\n", "'", ".", ",", "-", "=", "_", "/", "#", "*", ")"),
    *("é", "中", "あ", "한", "д", "\u0301", "\u200d", "\ufe0f", "🙂"),
    *("  ", "\n\n", " a", " 1", "'s", "'ll", "   b", "\n b", "\t", "\r\n", "12", "123", "aa"),
)


class Coder(Protocol):
    """What is asked of a tokenizer here; see :class:`everlong.reading.tokens.TextCoder`."""

    longest: int

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text as the start of a text."""

    def encode_many_after(self, texts: list[str]) -> list[list[int] | None]:
        """Ids of each text in the middle of a text; None where they cannot be told."""


def settle(coder: Coder, text: str, fresh: bool) -> tuple[list[int], int]:
    """Find the part of `text` whose tokens no text to come can change.

    Parameters
    ----------
    coder : Coder
        The tokenizer.
    text : str
        What has been taken and not yet been settled.
    fresh : bool
        Whether `text` begins a text, rather than going on in the middle of one.

    Returns
    -------
    ids : list of int
        The tokens of the settled part.
    end : int
        Where it ends; 0 if there is no such part.
    """
    last = len(text) - coder.longest
    if last <= 0:
        return [], 0
    start = max(0, last - _REACH - _CONTEXT)
    begins = fresh and start == 0
    futures = [text[start:end] for end in range(last, len(text))]
    futures += [text[start:] + more for more in ("", *_CONTINUATIONS)]
    now = len(text) - last  # index of the text as it is
    wholes = _encode(coder, futures, begins)
    seemingly = 0
    for cut in _candidates(text, last):
        (head,) = _encode(coder, [text[start:cut]], begins)
        if not _agree(coder, head, futures[now : now + 1], wholes[now : now + 1], cut - start):
            continue
        seemingly = seemingly or cut
        if _agree(coder, head, futures, wholes, cut - start):
            ids = _head_of_all(coder, text, cut, fresh)
            if ids is not None:
                return ids, cut
    if len(text) > _TOO_LONG:
        cut = seemingly or last
        return _encode(coder, [text[:cut]], fresh)[0] or [], cut
    return [], 0


def _candidates(text: str, last: int) -> Iterator[int]:
    """Places to cut at, the last first: ends of words, then anywhere."""
    first = max(1, last - _REACH)
    ends = [i for i in range(last, first - 1, -1) if text[i].isspace() and not text[i - 1].isspace()]
    yield from ends[:_WORD_ENDS]
    yield from range(last, first - 1, -1)


def _agree(
    coder: Coder, head: list[int] | None, futures: list[str], wholes: list[list[int] | None], cut: int
) -> bool:
    """Whether each future, cut there, has the tokens of the whole."""
    if head is None:
        return False
    rests = coder.encode_many_after([future[cut:] for future in futures])
    return all(
        whole is not None and rest is not None and whole == head + rest
        for whole, rest in zip(wholes, rests, strict=True)
    )


def _head_of_all(coder: Coder, text: str, cut: int, fresh: bool) -> list[int] | None:
    """Return the tokens up to the cut, if they and the rest's are those of the whole text."""
    whole, head = _encode(coder, [text, text[:cut]], fresh)
    (rest,) = coder.encode_many_after([text[cut:]])
    return (
        head if whole is not None and head is not None and rest is not None and whole == head + rest else None
    )


def _encode(coder: Coder, texts: list[str], fresh: bool) -> list[list[int] | None]:
    return list(coder.encode_many(texts)) if fresh else coder.encode_many_after(texts)
