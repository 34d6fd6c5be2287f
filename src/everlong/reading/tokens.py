"""Text pieces to token ids, such that the ids are those of the whole text tokenised at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from everlong.reading.settling import settle

_BATCH = 16_384  # characters collected before some are settled
_SETTLE_LEAST = 64  # characters worth settling
_RETRY_AFTER = 1024  # characters to wait for after no place to cut was found
_LONGEST = 256  # no token is taken to be longer, in characters


class TextCoder:
    """A model's tokenizer as a reader of plain text: special tokens come from templates, never from the text.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizerBase
        Where it supports ``split_special_tokens`` (all of transformers' own do), a special token spelled
        out in the text, such as ``<|im_end|>`` in a novel, is read as the characters it is made of.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        specials = {str(token): (number, token) for number, token in added.items() if token.special}
        for text, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
            specials.setdefault(text, (number, None))
        self._specials = specials
        longest_first = sorted(specials, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if specials else r"(?!)()")
        words = (len(word) for word in tokenizer.get_vocab() if word not in specials)
        self.longest = min(max(words, default=1), _LONGEST)
        """No token is longer than this, in characters (an upper bound)."""
        self._prefixes = self.encode("a\n") != self.encode("a") + self.encode("\n")
        self._marks = [(mark, self.encode(mark)) for mark in "\n|0~"] if self._prefixes else []
        self.bos = self._find_bos()
        """What the tokenizer puts before a text by itself: the start token, or nothing."""
        self.fresh_after_special = self._find_fresh_after_special()
        """Whether text after a special token is tokenised like text at the start."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` as the start of a text."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of `texts` as the start of a text."""
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False, padding=False
        )["input_ids"]
        return [list(row) for row in ids]

    def encode_after(self, text: str) -> list[int]:
        """Return the ids of `text` in the middle of a text, where no tokenizer puts a blank before it."""
        found = self.encode_many_after([text])[0]
        return self.encode(text) if found is None else found

    def encode_many_after(self, texts: Sequence[str]) -> list[list[int] | None]:
        """Return the ids of each of `texts` in the middle of a text; None where they cannot be told."""
        if not self._prefixes:
            return list(self.encode_many(texts))
        found: list[list[int] | None] = [None] * len(texts)
        for mark, mark_ids in self._marks:
            missing = [i for i, ids in enumerate(found) if ids is None]
            if not missing:
                break
            for i, ids in zip(missing, self.encode_many([mark + texts[i] for i in missing]), strict=True):
                if ids[: len(mark_ids)] == mark_ids:
                    found[i] = ids[len(mark_ids) :]
        return found

    def split_markup(self, rendered: str) -> list[str | int]:
        """Split a piece of a rendered chat template into plain texts and the ids of its special tokens."""
        pieces: list[str | int] = []
        strip_next = False
        for i, part in enumerate(self._split.split(rendered)):
            if i % 2 == 0:
                part = part.lstrip() if strip_next else part
                if part:
                    pieces.append(part)
                continue
            number, token = self._specials[part]
            if token is not None and token.lstrip and pieces and isinstance(pieces[-1], str):
                pieces[-1] = pieces[-1].rstrip()
            strip_next = token is not None and token.rstrip
            pieces.append(number)
        return [piece for piece in pieces if piece != ""]

    def _find_bos(self) -> list[int]:
        plain = self.encode("a")
        full = list(self.tokenizer("a", add_special_tokens=True, split_special_tokens=True)["input_ids"])
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        return []

    def _find_fresh_after_special(self) -> bool:
        if not self._prefixes or not self._specials:
            return True
        text, (number, _) = next(iter(self._specials.items()))
        ids = list(
            self.tokenizer(text + "a", add_special_tokens=False, split_special_tokens=False)["input_ids"]
        )
        return ids == [number, *self.encode("a")]


class TokenStream:
    """Takes text in pieces of any size and gives the ids of the whole, holding back an unsettled tail.

    Parameters
    ----------
    coder : TextCoder
        The tokenizer.
    tail : str
        Text taken but not yet given as ids, from a saved stream.
    fresh : bool
        Whether the tail begins a text, rather than going on in the middle of one.
    """

    def __init__(self, coder: TextCoder, tail: str = "", fresh: bool = True) -> None:
        self._coder = coder
        self.tail = tail
        self.fresh = fresh
        self._retry_at = 0

    def feed(self, text: str) -> list[int]:
        """Take a piece of text; return what ids have become certain."""
        self.tail += text
        return self.settle() if len(self.tail) >= _BATCH else []

    def settle(self) -> list[int]:
        """Return the ids of the tail that no text to come can change, and keep the rest of it."""
        if len(self.tail) < max(self._coder.longest + _SETTLE_LEAST, self._retry_at):
            return []
        ids, end = settle(self._coder, self.tail, self.fresh)
        self._retry_at = 0 if end else len(self.tail) + _RETRY_AFTER
        if end:
            self.tail, self.fresh = self.tail[end:], False
        return ids

    def finish(self) -> list[int]:
        """Return the ids of the whole tail: the text ends here, and what follows does not merge with it."""
        ids = self._held()
        if self.tail:
            self.tail, self.fresh, self._retry_at = "", False, 0
        return ids

    def special(self, token: int) -> list[int]:
        """End the text with a special token; return the ids of both."""
        ids = [*self.finish(), token]
        self.fresh = self._coder.fresh_after_special
        return ids

    def markup(self, rendered: str) -> list[int]:
        """Take a piece of a rendered chat template, special tokens included."""
        ids: list[int] = []
        for piece in self._coder.split_markup(rendered):
            ids += self.special(piece) if isinstance(piece, int) else self.feed(piece)
        return ids

    @property
    def held(self) -> int:
        """Tokens that the tail would be if the text ended here."""
        return len(self._held())

    def fork(self) -> TokenStream:
        """Return an independent copy."""
        return TokenStream(self._coder, self.tail, self.fresh)

    def _held(self) -> list[int]:
        if not self.tail:
            return []
        return self._coder.encode(self.tail) if self.fresh else self._coder.encode_after(self.tail)
