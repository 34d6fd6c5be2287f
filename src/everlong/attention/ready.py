"""Recalled tokens made ready for attention; what is wanted again is not read again."""

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

    A copy begins with none.
    """

    def __init__(self) -> None:
        self._spans: list[list[Span]] = []
        self._held: tuple[Tensor, Tensor] | None = None
        self._coded = 0  # index of the first token that was not in a whole block of the tier

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self._held is None else sum(x.nbytes for x in self._held)

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
            self._spans, self._held = [], None
            return self._read(wanted, view)
        self._drop_what_was_coded(view)
        if self._held is None or wanted != self._spans:
            with torch.inference_mode(False), torch.no_grad():  # later forwards, in whatever mode, see it
                held = self._read(wanted, view)
            self._spans, self._held = wanted, held
        return self._held

    def _drop_what_was_coded(self, view: LayerView) -> None:
        """Let go of spans that were exact when they were read, and since are coded in the tier."""
        tier = view.memory.tier
        before, now = self._coded, view.memory.sinks + (0 if tier is None else tier.whole)
        self._coded = now
        for row, some in enumerate(self._spans):
            pad = view.pads[row] if view.pads else 0
            if before != now and any(stop + pad > before and begin + pad < now for begin, stop in some):
                self._spans, self._held = [], None
                return

    def _read(self, wanted: Sequence[Sequence[Span]], view: LayerView) -> tuple[Tensor, Tensor]:
        rows = [self._row(row, some, view) for row, some in enumerate(wanted)]
        return _stacked([keys for keys, _ in rows]), _stacked([values for _, values in rows])

    def _row(self, row: int, spans: Sequence[Span], view: LayerView) -> tuple[Tensor, Tensor]:
        """Return keys and values of one row's spans: those that are held are copied, others read."""
        found: list[tuple[Tensor, Tensor]] = []
        held = self._places(row)
        pad = view.pads[row] if view.pads else 0
        for span in spans:
            if span in held and self._held is not None:
                at = held[span]
                keys, values = (x[row, :, at : at + span[1] - span[0]] for x in self._held)
            else:
                keys, values = (x[row] for x in view.middle(span[0] + pad, span[1] + pad))
            found.append((keys, values))
        if not found:
            keys, values = (x[row, :, :0] for x in view.middle(*_any_of(view)))
            return keys, values
        return torch.cat([keys for keys, _ in found], 1), torch.cat([values for _, values in found], 1)

    def _places(self, row: int) -> dict[Span, int]:
        places, at = {}, 0
        for begin, stop in self._spans[row] if row < len(self._spans) else ():
            places[begin, stop] = at
            at += stop - begin
        return places


def _stacked(rows: list[Tensor]) -> Tensor:
    """Return rows of shape (heads, tokens, d) as one batch, zeros behind those that have fewer tokens."""
    most = max(row.shape[1] for row in rows)
    whole = [row if row.shape[1] == most else F.pad(row, (0, 0, 0, most - row.shape[1])) for row in rows]
    return whole[0][None] if len(whole) == 1 else torch.stack(whole)


def _any_of(view: LayerView) -> Span:
    """Return where one token is that the view has, whichever."""
    return view.stop - 1, view.stop
