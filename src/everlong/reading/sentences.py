"""Token ids, cut after their sentences: by punctuation and lines, in any language, and never without end."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from everlong.reading.detokenize import Detokenizer

LONGEST = 128
"""Tokens of a sentence at most, where nothing else is said."""

_TAIL = 64  # characters of a sentence that are looked at to see whether it ends
_NARROW = ".!?…؟۔।॥։።។"  # a blank follows where these end a sentence
_WIDE = "。！？｡．"  # nothing needs to follow these
_CLOSING = "\"'”’»›)]}）］」』】》〉"
_ABBREVIATED = re.compile(r"(?:^|[^\w])([^\W\d_]{1,3})\.$")


class SentenceCutter:
    """Takes token ids in pieces and gives whole sentences, whose ids joined are those that were taken.

    A sentence ends with its punctuation, at a blank line, or at the end of a line, unless the next line goes
    on with a small letter. A full stop after a capital letter and up to two more, or before a small letter,
    ends none.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Tells the text of the ids.
    longest : int
        Tokens of a sentence at most; a longer one is cut, between characters.
    """

    def __init__(self, tokenizer: Any, longest: int = LONGEST) -> None:
        self._text = Detokenizer(tokenizer, clusters=False)
        self._longest = longest
        self._ids: list[int] = []
        self._said = ""  # the end of their text

    def feed(self, ids: Iterable[int]) -> list[list[int]]:
        """Take ids; return the sentences that they make whole."""
        whole: list[list[int]] = []
        for token in ids:
            waiting = self._text.unfinished
            piece = self._text.put(token)
            at = len(self._ids) - waiting  # the piece begins there
            if piece and at and ends_between(self._said, piece):
                whole.append(self._cut(at))
                self._said = ""
            self._ids.append(token)
            self._said = (self._said + piece)[-_TAIL:]
            if len(self._ids) == self._longest:
                whole.append(self._cut(self._longest - self._text.unfinished or self._longest))
        return whole

    def finish(self) -> list[list[int]]:
        """Return what is left: the last sentence, if there is one."""
        self._text.finish()
        return [self._cut(len(self._ids))] if self._ids else []

    def _cut(self, at: int) -> list[int]:
        sentence, self._ids = self._ids[:at], self._ids[at:]
        return sentence


def ends_between(before: str, after: str) -> bool:
    """Whether a sentence ends between two pieces of a text; not yet known where `after` is blank: no."""
    body, rest = before.rstrip(), after.lstrip()
    if not body or not rest:
        return False
    gap = before[len(body) :] + after[: len(after) - len(rest)]
    goes_on = rest[0].islower()
    if "\n" in gap:
        return gap.count("\n") > 1 or not (goes_on and gap.endswith("\n"))
    stripped = body.rstrip(_CLOSING)
    last = stripped[-1:]
    if last and last in _WIDE:
        return rest[0] not in _WIDE + _CLOSING
    return bool(last and gap and last in _NARROW and not goes_on and not _is_abbreviated(stripped))


def _is_abbreviated(text: str) -> bool:
    """Whether a text ends with a full stop after a short word with a capital, such as a title."""
    match = _ABBREVIATED.search(text)
    return match is not None and match.group(1)[0].isupper()


def packed(sentences: Iterable[list[int]], most: int) -> Iterator[list[list[int]]]:
    """Put sentences together, in order, as many as have at most `most` tokens; none is longer than that."""
    held: list[list[int]] = []
    count = 0
    for sentence in sentences:
        if held and count + len(sentence) > most:
            yield held
            held, count = [], 0
        held.append(sentence)
        count += len(sentence)
    if held:
        yield held
