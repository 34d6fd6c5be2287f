"""Recalled tokens made ready for attention; what is soon wanted again is not read again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.models.rotary import Frequencies, Positions

if TYPE_CHECKING:
    from everlong.attention.layer_memory import LayerMemory
    from everlong.attention.positions import Rotation
    from everlong.attention.view import LayerView
    from everlong.kernels.standing import Standing

Span = tuple[int, int]
"""Tokens [begin, stop) of a row, its padding not counted."""

Choice = list[list[Span]]
"""What a row recalls: the spans of each key-value head, or of all heads together in a single list."""

_Place = tuple[int, int, Span]
"""A row, the place of a list in its choice, and a span of that list."""


class ReadyTokens:
    """The tokens of one layer that were recalled last: raw keys and values, for each row its own.

    Beside those that are wanted now it has up to as many that were wanted before, the latest of them. A copy
    begins with none. Where heads choose for themselves, each has only its own. Those wanted now stand behind
    the sinks, too, rotated to where they are seen.
    """

    def __init__(self) -> None:
        self._chosen: list[Choice] = []
        self._held: tuple[Tensor, Tensor] | None = None
        self._placed: tuple[Tensor, Tensor, Frequencies | None] | None = None
        self._left: dict[_Place, tuple[Tensor, Tensor]] = {}  # the latest last
        self.call: Standing | None = None  # what attends to those wanted now; it holds on to them
        self._coded = 0  # index of the first token that was not in a whole block of the tier

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.anew()

    def anew(self) -> Self:
        """Return one that has nothing ready yet."""
        return type(self)()

    def nbytes(self) -> int:
        """Bytes held."""
        kept = [*self._left.values()]
        if self._held is not None:
            kept.append(self._held)
        if self._placed is not None and self._held is not None:
            keys, values, _ = self._placed
            sinks = values.shape[2] - self._held[1].shape[2]
            own = keys if keys is not self._held[0] else keys[:, :, :0]  # the same where nothing is rotated
            kept.append((own, values[:, :, :sinks]))  # the other values are those that are held
        return sum(keys.nbytes + values.nbytes for keys, values in kept)

    def placed(
        self, chosen: Sequence[Choice], view: LayerView, places: Positions, *, is_final: bool
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the sinks, and behind them of each row's spans, keys rotated.

        Parameters
        ----------
        chosen : sequence of Choice
            As for :meth:`fetch`; all may be empty.
        view : LayerView
            Where they are read.
        places : int or Tensor
            To where keys are rotated, the same as long as the choice is.
        is_final : bool
            Whether all rows have their sinks.

        Returns
        -------
        Tensor, Tensor
            Shape (batch, key-value heads, sinks + m, d).
        """
        if not any(spans for choice in chosen for spans in choice):
            keys, values = view.sinks()
            return view.rotation(keys, places), values
        raw, values = self.fetch(chosen, view)
        frequencies = view.rotation.frequencies
        if self._placed is not None and self._placed[2] is frequencies:
            return self._placed[:2]
        may_stay = is_final and not view.wants_gradient
        with torch.inference_mode(torch.is_inference_mode_enabled() and not may_stay):
            if view.memory.sinks:
                raw, values = (torch.cat(x, 2) for x in zip(view.sinks(), (raw, values), strict=True))
            keys = view.rotation(raw, places)
        if may_stay and self._held is not None:
            sinks = view.memory.sinks
            self._placed = keys, values, frequencies
            self._held = self._held[0], values[:, :, sinks:]
        return keys, values

    def stays(self, memory: LayerMemory, rotation: Rotation) -> bool:
        """Whether what was placed last is what the next token a row is to see, if its choice is."""
        return (
            self._placed is not None
            and self._placed[2] is rotation.frequencies
            and memory.tier is not None
            and self._coded == memory.sinks + memory.tier.whole
            and not memory.tier.is_last_of_block
        )

    def standing(self) -> tuple[Tensor, Tensor]:
        """Return what was placed last, as :meth:`placed` did."""
        assert self._placed is not None
        return self._placed[:2]

    def fetch(self, chosen: Sequence[Sequence[Sequence[Span]]], view: LayerView) -> tuple[Tensor, Tensor]:
        """Return raw keys and values of each row's spans, one behind the other.

        Parameters
        ----------
        chosen : sequence of Choice
            Of each row; spans in order, not all empty, and for each head of a row as many tokens.
        view : LayerView
            Where they are read: a span that several heads want, once.

        Returns
        -------
        Tensor, Tensor
            Shape (batch, key-value heads, m, d), m of the row that has most; others end in zeros.
        """
        wanted = [[list(spans) for spans in choice] for choice in chosen]
        if view.wants_gradient:  # into what is not settled
            self._forget()
            return _stacked([self._row(row, choice, view) for row, choice in enumerate(wanted)])
        self._drop_what_was_coded(view)
        if self._held is None or wanted != self._chosen:
            self._drop_other_lists(wanted)
            with torch.inference_mode(False), torch.no_grad():  # later forwards, in whatever mode, see it
                held = _stacked([self._row(row, choice, view) for row, choice in enumerate(wanted)])
                self._set_aside(wanted, held[0].shape[1])
            self._chosen, self._held, self._placed, self.call = wanted, held, None, None
        return self._held

    def _forget(self) -> None:
        self._chosen, self._held, self._placed, self._left, self.call = [], None, None, {}, None

    def _drop_what_was_coded(self, view: LayerView) -> None:
        """Let go of spans that were exact when they were read, and since are coded in the tier."""
        tier = view.memory.tier
        before, now = self._coded, view.memory.sinks + (0 if tier is None else tier.whole)
        self._coded = now
        if before == now:
            return
        held = [(row, span) for row, choice in enumerate(self._chosen) for spans in choice for span in spans]
        for row, (begin, stop) in (*held, *((row, span) for row, _, span in self._left)):
            pad = view.pads[row] if view.pads else 0
            if stop + pad > before and begin + pad < now:
                return self._forget()

    def _row(self, row: int, choice: Choice, view: LayerView) -> tuple[Tensor, Tensor]:
        """Return keys and values of one row's choice: those that are held are copied, others read."""
        pad = view.pads[row] if view.pads else 0
        read: dict[Span, tuple[Tensor, Tensor]] = {}
        lists: list[tuple[Tensor, Tensor]] = []
        for which, spans in enumerate(choice):
            heads = slice(None) if len(choice) == 1 else slice(which, which + 1)
            places = self._places(row, which, len(choice))
            found: list[tuple[Tensor, Tensor]] = []
            for piece in _joined(spans, places):
                if isinstance(piece, slice):
                    found.append(self._at(row, heads, piece))
                elif (row, which, piece) in self._left:
                    found.append(self._left[row, which, piece])
                else:
                    if piece not in read:
                        read[piece] = view.middle(piece[0] + pad, piece[1] + pad)
                    keys, values = read[piece]
                    found.append((keys[row, heads], values[row, heads]))
            if not found:
                keys, values = view.middle(*_any_of(view))
                found.append((keys[row, heads, :0], values[row, heads, :0]))
            lists.append((torch.cat([keys for keys, _ in found], 1), torch.cat([x for _, x in found], 1)))
        if len(lists) == 1:
            return lists[0]
        return torch.cat([keys for keys, _ in lists]), torch.cat([values for _, values in lists])

    def _set_aside(self, wanted: Sequence[Choice], heads: int) -> None:
        """Keep what is not wanted any more beside what is, as long as there is room."""
        room = 0
        for row, choice in enumerate(wanted):
            for which, spans in enumerate(choice):
                own = slice(None) if len(choice) == 1 else slice(which, which + 1)
                room += sum(stop - begin for begin, stop in spans) * (heads // len(choice))
                places, stay = self._places(row, which, len(choice)), set(spans)
                for span, at in places.items():
                    if span not in stay:
                        keys, values = self._at(row, own, slice(at, at + span[1] - span[0]))
                        self._left[row, which, span] = keys.clone(), values.clone()
                for span in spans:
                    self._left.pop((row, which, span), None)
        room -= sum(keys.shape[0] * keys.shape[1] for keys, _ in self._left.values())
        while room < 0:
            keys, _ = self._left.pop(next(iter(self._left)))
            room += keys.shape[0] * keys.shape[1]

    def _drop_other_lists(self, wanted: Sequence[Choice]) -> None:
        """Let go of what a row's heads wanted together where they choose for themselves now, and back."""
        for row, (old, new) in enumerate(zip(self._chosen, wanted, strict=False)):
            if len(old) != len(new):
                self._left = {place: tokens for place, tokens in self._left.items() if place[0] != row}

    def _at(self, row: int, heads: slice, here: slice) -> tuple[Tensor, Tensor]:
        assert self._held is not None
        keys, values = self._held
        return keys[row, heads, here], values[row, heads, here]

    def _places(self, row: int, which: int, lists: int) -> dict[Span, int]:
        """Return where the spans of a list are held, if the row's choice had as many lists."""
        places: dict[Span, int] = {}
        if row >= len(self._chosen) or len(self._chosen[row]) != lists:
            return places
        at = 0
        for begin, stop in self._chosen[row][which]:
            places[begin, stop] = at
            at += stop - begin
        return places


def _joined(spans: Sequence[Span], places: dict[Span, int]) -> list[slice | Span]:
    """Return where spans are held, as one where one lies behind the other; and those that are not held."""
    found: list[slice | Span] = []
    for span in spans:
        at = places.get(span)
        if at is None:
            found.append(span)
            continue
        stop, last = at + span[1] - span[0], found[-1] if found else None
        if isinstance(last, slice) and last.stop == at:
            found[-1] = slice(last.start, stop)
        else:
            found.append(slice(at, stop))
    return found


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
