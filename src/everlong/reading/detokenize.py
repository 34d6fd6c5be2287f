"""Token ids to text as they come: never half a character, never a part of a stop string."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

from everlong.errors import ConfigurationError

_CONTEXT = 8  # tokens before the first that are looked at
_SILENT = 64  # tokens without text after which those before them are let go
_LONGEST_CHARACTER = 16  # tokens after which bytes that are no character are given up on
_UNFINISHED = "\ufffd"
_JOINER = "\u200d"


class Detokenizer:
    """Turns tokens into text that can be shown at once.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    context : sequence of int
        The tokens before the first: a blank between them and the first is part of the text.
    stop : sequence of str
        Texts at which to stop; neither they nor what follows them is given out.
    clusters : bool
        Whether characters are given out as people count them, with the marks on them.
    """

    def __init__(
        self,
        tokenizer: Any,
        context: Sequence[int] = (),
        stop: Sequence[str] = (),
        *,
        clusters: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._clusters = clusters
        self._stop = tuple(stop)
        # The tokens last taken: decoded together with the next, so that blanks between words are kept.
        self._before = list(context)[-_CONTEXT:]
        self._before_text = self._decode(self._before)
        while self._before_text.startswith(_UNFINISHED):
            self._before = self._before[1:]
            self._before_text = self._decode(self._before)
        self._group: list[int] = []  # tokens that do not make whole characters yet
        self._text = ""  # not given out yet
        self.stopped = False
        """Whether a stop string was met."""

    def put(self, token: int) -> str:
        """Take a token; return what text has become certain, often none."""
        self._group.append(token)
        text = self._decode(self._before + self._group)
        is_whole = text.startswith(self._before_text) and not text.endswith(_UNFINISHED)
        if not is_whole and len(self._group) < _LONGEST_CHARACTER:
            return ""
        self._take(text)
        open_cluster = _open_cluster(self._text) if self._clusters else 0
        return self._give(len(self._text) - max(self._begun_stop(), open_cluster))

    @property
    def unfinished(self) -> int:
        """Tokens taken last that do not make whole characters yet."""
        return len(self._group)

    def finish(self) -> str:
        """Return what text is left."""
        if self._group:
            self._take(self._decode(self._before + self._group))
        return self._give(len(self._text))

    def _take(self, text: str) -> None:
        new = text[_shared(text, self._before_text) :]
        self._text += new
        is_silent = (
            not new and len(self._before) < _SILENT
        )  # a special token: the blank after it still counts
        self._before = self._before + self._group if is_silent else self._group
        self._before_text = self._decode(self._before)
        self._group = []

    def _give(self, end: int) -> str:
        """Give out the text up to `end`, or up to the first stop string in it."""
        if self.stopped:
            return ""
        found = [place for place in (self._text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            end = min(found)
        given, self._text = self._text[:end], self._text[end:]
        return given

    def _begun_stop(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._text)), longest, -1):
                if self._text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def checked_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """Return stop strings as a tuple; raise if one of them cannot be met."""
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ConfigurationError(
                f"a stop string must be a text of at least one character, not {string!r}"
            )
    return strings


def _shared(text: str, other: str) -> int:
    """Length of the beginning that both share."""
    if text.startswith(other):
        return len(other)
    return next(
        (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
    )


def _open_cluster(text: str) -> int:
    """Length of the last character as people count them, if what follows may still belong to it.

    An emoji may be joined to the next one, a flag is two letters, and marks follow the letters of many
    scripts. Latin letters and CJK characters are taken as complete.
    """
    if not text or _is_complete(text[-1]):
        return 0
    start = len(text)
    while start:
        start -= 1
        character = text[start]
        if _extends(character) or character == _JOINER:
            continue
        if start and text[start - 1] == _JOINER:
            continue
        if _is_flag_letter(character):
            letters = 1
            while start >= letters and _is_flag_letter(text[start - letters]):
                letters += 1
            start -= (letters + 1) % 2
        break
    return len(text) - start


def _is_complete(character: str) -> bool:
    code = ord(character)
    return code < 0x300 or 0x3000 <= code <= 0x9FFF or 0xAC00 <= code <= 0xD7A3


def _extends(character: str) -> bool:
    code = ord(character)
    return (
        0x1F3FB <= code <= 0x1F3FF
        or 0xE0020 <= code <= 0xE007F
        or unicodedata.category(character) in ("Mn", "Me", "Mc")
    )


def _is_flag_letter(character: str) -> bool:
    return 0x1F1E6 <= ord(character) <= 0x1F1FF
