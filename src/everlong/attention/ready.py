"""Recalled tokens made ready for attention; what is soon wanted again is not read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from everlong.attention.view import LayerView

Span = tuple[int, int]
"""Tokens [begin, stop) of a row, its padding not counted."""


class ReadyTokens:
    """The tokens of one layer that were recalled last: raw keys and values, for each row its own.

    Beside those that are wanted now it has up to as many that were wanted before, the latest of them. A copy
    begins with none.
    """

    def __init__(self) -> None:
        self._spans: list[list[Span]] = []
        self._held: tuple[Tensor, Tensor] | None = None
        self._left: dict[tuple[int, Span], tuple[Tensor, Tensor]] = {}  # of a row; the latest last
        self._coded = 0  # index of the first token that was not in a whole block of the tier

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def nbytes(self) -> int:
        """Bytes held."""
        kept = [*([] if self._held is None else [self._held]), *self._left.values()]
        return sum(keys.nbytes + values.nbytes for keys, values in kept)

    def fetch(self, spans: Sequence[Sequence[Span]], view: LayerView) -> tuple[Tensor, Tensor]:
        """Return raw keys and values of each row's spans, one behind the other.

        Parameters
        ----------
        spans : sequence of sequences of Span
            Of each row; in order, and not all empty.
        view : LayerView
            Where they are read.

        Returns
        -------
        Tensor, Tensor
            Shape (batch, key-value heads, m, d), m of the row that has most; others end in zeros.
        """
        wanted = [list(some) for some in spans]
        if view.wants_gradient:  # into what is not settled
            self._forget()
            return _stacked([self._row(row, some, view) for row, some in enumerate(wanted)])
        self._drop_what_was_coded(view)
        if self._held is None or wanted != self._spans:
            with torch.inference_mode(False), torch.no_grad():  # later forwards, in whatever mode, see it
                held = _stacked([self._row(row, some, view) for row, some in enumerate(wanted)])
                self._set_aside(wanted)
            self._spans, self._held = wanted, held
        return self._held

    def _forget(self) -> None:
        self._spans, self._held, self._left = [], None, {}

    def _drop_what_was_coded(self, view: LayerView) -> None:
        """Let go of spans that were exact when they were read, and since are coded in the tier."""
        tier = view.memory.tier
        before, now = self._coded, view.memory.sinks + (0 if tier is None else tier.whole)
        self._coded = now
        if before == now:
            return
        held = [(row, span) for row, some in enumerate(self._spans) for span in some]
        for row, (begin, stop) in (*held, *self._left):
            pad = view.pads[row] if view.pads else 0
            if stop + pad > before and begin + pad < now:
                return self._forget()

    def _row(self, row: int, spans: Sequence[Span], view: LayerView) -> tuple[Tensor, Tensor]:
        """Return keys and values of one row's spans: those that are held are copied, others read."""
        found: list[tuple[Tensor, Tensor]] = []
        places = self._places(row)
        pad = view.pads[row] if view.pads else 0
        for span in spans:
            if span in places:
                found.append(self._at(row, span, places[span]))
            elif (row, span) in self._left:
                found.append(self._left[row, span])
            else:
                keys, values = view.middle(span[0] + pad, span[1] + pad)
                found.append((keys[row], values[row]))
        if not found:
            keys, values = (x[row, :, :0] for x in view.middle(*_any_of(view)))
            return keys, values
        return torch.cat([keys for keys, _ in found], 1), torch.cat([values for _, values in found], 1)

    def _set_aside(self, wanted: Sequence[Sequence[Span]]) -> None:
        """Keep what is not wanted any more beside what is, as long as there is room."""
        room = sum(stop - begin for some in wanted for begin, stop in some)
        for row, some in enumerate(wanted):
            for span, at in self._places(row).items():
                if span not in some:
                    keys, values = self._at(row, span, at)
                    self._left[row, span] = keys.clone(), values.clone()
            for span in some:
                self._left.pop((row, span), None)
        room -= sum(stop - begin for _, (begin, stop) in self._left)
        while room < 0:
            row, (begin, stop) = next(iter(self._left))
            del self._left[row, (begin, stop)]
            room += stop - begin

    def _at(self, row: int, span: Span, place: int) -> tuple[Tensor, Tensor]:
        assert self._held is not None
        keys, values = self._held
        here = slice(place, place + span[1] - span[0])
        return keys[row, :, here], values[row, :, here]

    def _places(self, row: int) -> dict[Span, int]:
        places, at = {}, 0
        for begin, stop in self._spans[row] if row < len(self._spans) else ():
            places[begin, stop] = at
            at += stop - begin
        return places


def _stacked(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return keys and values of rows, shape (heads, tokens, d), as one batch of each."""
    return _padded([keys for keys, _ in found]), _padded([values for _, values in found])


def _padded(rows: list[Tensor]) -> Tensor:
    """Return rows as one batch, zeros behind those that have fewer tokens."""
    most = max(row.shape[1] for row in rows)
    whole = [row if row.shape[1] == most else F.pad(row, (0, 0, 0, most - row.shape[1])) for row in rows]
    return whole[0][None] if len(whole) == 1 else torch.stack(whole)


def _any_of(view: LayerView) -> Span:
    """Return where one token is that the view has, whichever."""
    return view.stop - 1, view.stop
