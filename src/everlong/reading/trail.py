"""The trail of a stream: tokens whose text is to be learned once they have left the window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from everlong.reading.detokenize import Detokenizer

_CONTEXT = 16  # tokens before those that leave: a blank between them is part of the text
_BREAK = "\n\n"


class Trail:
    """The tokens of a stream that are to be learned, each with its index, until they leave."""

    def __init__(self) -> None:
        self.learns = False
        """Whether what comes onto the tape now is to be learned."""
        self._held: deque[tuple[bool, int]] = deque()  # the same of text that waits, and how many tokens
        self._tokens: deque[tuple[int, int]] = deque()
        self._left: list[int] = []  # the last that left
        self._next = -1  # the index after it

    def turn(self, learns: bool, held: Callable[[], int]) -> None:
        """Learn what comes onto the tape from here on, or do not.

        Parameters
        ----------
        learns : bool
            Which.
        held : callable
            Tells how many tokens the text makes that came before and is still held back.
        """
        if learns != self.learns:
            known = sum(count for _, count in self._held)
            self._held.append((self.learns, max(0, held() - known)))
            self.learns = learns

    def accept(self, ids: Sequence[int], index: int) -> None:
        """Take tokens that come onto the tape, the first of them at that index in the stream."""
        start = 0
        while start < len(ids):
            learns, count = self._held.popleft() if self._held else (self.learns, len(ids) - start)
            stop = min(start + count, len(ids))
            if start + count > stop:
                self._held.appendleft((learns, start + count - stop))
            if learns:
                self._tokens.extend((index + number, ids[number]) for number in range(start, stop))
            start = stop

    def leave(self, index: int | None, tokenizer: Any) -> str:
        """Let go of the tokens before `index` (None: of all) and return their text.

        A character of several tokens waits for the last of them. What did not follow what was before is a
        blank line apart.
        """
        texts = []
        while run := self._run(index):
            first, is_over = run[0][0], index is None or self._ends_after(run)
            if self._next not in (-1, first):
                self._left = []
                texts.append(_BREAK)
            text, count = _decoded(tokenizer, self._left, [token for _, token in run], is_over)
            for _ in range(count):
                self._tokens.popleft()
            if not count:
                break
            texts.append(text)
            self._next = first + count
            self._left = [*self._left, *(token for _, token in run[:count])][-_CONTEXT:]
            if not is_over:
                break
        return "".join(texts)

    def _run(self, index: int | None) -> list[tuple[int, int]]:
        """Return the first tokens that follow one another, those before `index`."""
        run: list[tuple[int, int]] = []
        for place, token in self._tokens:
            if (index is not None and place >= index) or (run and place != run[-1][0] + 1):
                break
            run.append((place, token))
        return run

    def _ends_after(self, run: list[tuple[int, int]]) -> bool:
        """Whether what comes after a run is known not to follow it."""
        after = next(islice(self._tokens, len(run), None), None)
        return after is not None and after[0] != run[-1][0] + 1

    def state(self) -> dict[str, Any]:
        """Return JSON-able values for :meth:`restored`."""
        return {
            "learns": self.learns,
            "held": list(self._held),
            "tokens": list(self._tokens),
            "left": self._left,
            "next": self._next,
        }

    @classmethod
    def restored(cls, values: dict[str, Any]) -> Trail:
        """Rebuild a trail from :meth:`state`."""
        trail = cls()
        trail.learns, trail._next, trail._left = values["learns"], values["next"], values["left"]
        trail._held = deque((learns, count) for learns, count in values["held"])
        trail._tokens = deque((index, token) for index, token in values["tokens"])
        return trail


def _decoded(tokenizer: Any, before: list[int], ids: list[int], is_over: bool) -> tuple[str, int]:
    """Return the text of the tokens that make whole characters, and how many they are: all, if it is over."""
    text = Detokenizer(tokenizer, before)
    pieces = [text.put(token) for token in ids]
    if text.unfinished and not is_over:
        return _decoded(tokenizer, before, ids[: -text.unfinished], True)
    return "".join([*pieces, text.finish()]), len(ids)
