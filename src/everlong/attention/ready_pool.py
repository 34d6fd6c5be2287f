"""Recalled blocks made ready for attention, where all heads of a row want the same, seen at one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from everlong.attention.ready import Choice, ReadyTokens, Span

if TYPE_CHECKING:
    from everlong.attention.view import LayerView
    from everlong.models.rotary import Positions


class ReadyPool(ReadyTokens):
    """The same as its base, for blocks of one size, of which few are exchanged from one asking to the next.

    A row's blocks, those that are wanted and the latest of those that were, lie in slots of a pool, keys
    rotated to 0 already; what is wanted is brought together from there in the order of the stream. So the
    blocks that stay are copied once, and none is set aside. Whatever is no such choice, or seen elsewhere, is
    the base's.

    Parameters
    ----------
    block : int
        Tokens of a block.
    most : int
        Blocks that a row wants at most; the pool has twice as many slots.
    """

    def __init__(self, block: int, most: int) -> None:
        super().__init__()
        self._block, self._most = block, most
        self._pool: tuple[Tensor, Tensor] | None = None  # (batch, key-value heads, slots, block * d)
        self._slots: list[dict[Span, int]] = []  # of each row: which block lies where, the latest wanted last
        self._wanted: list[list[Span]] = []
        self._free: list[list[int]] = []  # slots of each row where nothing lies
        self._scaling: float | None = None  # of the rotation to 0 that the keys went through
        self._buffers: tuple[Tensor, Tensor] | None = None

    def anew(self) -> Self:
        """Return one that has nothing ready yet."""
        return type(self)(self._block, self._most)

    def nbytes(self) -> int:
        """Bytes held."""
        count = super().nbytes()
        for x in (*(self._pool or ()), *(self._buffers or ())):
            count += x.nbytes
        return count

    def placed(
        self, chosen: Sequence[Choice], view: LayerView, places: Positions, *, is_final: bool
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the sinks, and behind them of each row's spans; as the base does."""
        may_be_kept = torch.is_grad_enabled()  # by what a gradient goes through
        if not isinstance(places, int) or places or may_be_kept or not self._takes(chosen):
            if self._pool is not None:
                self._empty()
            return super().placed(chosen, view, places, is_final=is_final)
        if self._held is not None:  # the base's
            self._forget()
        frequencies, wanted = view.rotation.frequencies, [list(spans) for (spans,) in chosen]
        scaling = None if frequencies is None else frequencies.scaling
        if scaling != self._scaling:
            self._empty()
        self._scaling = scaling
        self._drop_coded_blocks(view)
        if self._placed is None or wanted != self._wanted:
            self._wanted, self._placed = wanted, None
            try:
                with torch.inference_mode(False), torch.no_grad():  # later forwards, in whatever mode, see it
                    if self._pool is None:
                        self._reserve(view)
                    for row, spans in enumerate(wanted):
                        self._bring(row, spans, view)
                    found = self._together(view)
            except BaseException:  # some slots may not hold what they are said to
                self._empty()
                raise
        else:
            found = self._placed[:2]
        self._placed = (*found, frequencies) if is_final else None
        return found

    def _takes(self, chosen: Sequence[Choice]) -> bool:
        """Whether all rows want blocks for all heads, some of them any, and none too many."""
        return any(choice[0] for choice in chosen) and all(
            len(choice) == 1
            and len(choice[0]) <= self._most
            and all(stop - begin == self._block for begin, stop in choice[0])
            for choice in chosen
        )

    def _empty(self) -> None:
        self._pool, self._buffers, self._placed, self._slots, self._wanted = None, None, None, [], []
        self.call = None

    def _drop_coded_blocks(self, view: LayerView) -> None:
        """Let go of blocks that were exact when they were read, and since are coded in the tier."""
        tier = view.memory.tier
        before, self._coded = self._coded, view.memory.sinks + (0 if tier is None else tier.whole)
        if before == self._coded:
            return
        for row, slots in enumerate(self._slots):
            pad = view.pads[row] if view.pads else 0
            for begin, stop in [*slots]:
                if stop + pad > before and begin + pad < self._coded:
                    self._free[row].append(slots.pop((begin, stop)))
                    self._placed = None

    def _bring(self, row: int, spans: Sequence[Span], view: LayerView) -> None:
        """Have a row's blocks in its slots: those that are not, in place of what was not wanted longest."""
        assert self._pool is not None
        slots, free = self._slots[row], self._free[row]
        missing = [span for span in spans if span not in slots]
        pad = view.pads[row] if view.pads else 0
        read = [view.middle(begin + pad, stop + pad) for begin, stop in _runs(missing)]
        for span in spans:
            if span in slots:
                slots[span] = slots.pop(span)
        if not missing:
            return
        for span in missing:
            slots[span] = free.pop() if free else slots.pop(next(iter(slots)))
        keys, values = (torch.cat([x[row] for x in some], 1) for some in zip(*read, strict=True))
        index = torch.tensor([slots[span] for span in missing], device=keys.device)
        for pool, new in zip(self._pool, (view.rotation(keys[None], 0)[0], values), strict=True):
            pool[row].index_copy_(1, index, new.reshape(len(new), len(missing), -1))

    def _reserve(self, view: LayerView) -> None:
        """Make a pool, of which nothing is filled yet."""
        memory, count = view.memory, 2 * self._most
        keys, values = (memory.keys, memory.values) if view.new is None else view.new[:2]
        assert keys is not None and values is not None
        shapes = ((*x.shape[:2], count, self._block * x.shape[3]) for x in (keys, values))
        self._pool = keys.new_empty(next(shapes)), values.new_empty(next(shapes))
        self._slots = [{} for _ in keys]
        self._free = [[*range(count)][::-1] for _ in keys]

    def _together(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Return the sinks and behind them what rows want, in memory that is written anew each time."""
        assert self._pool is not None
        sinks = view.memory.sinks
        length = sinks + self._block * max(map(len, self._wanted))
        if self._buffers is None or self._buffers[0].shape[2] != length:
            shapes = [(*pool.shape[:2], length, pool.shape[3] // self._block) for pool in self._pool]
            self._buffers, self.call = None, None  # before there are others
            self._buffers = self._pool[0].new_empty(shapes[0]), self._pool[1].new_empty(shapes[1])
        if sinks:
            keys, values = view.sinks()
            self._buffers[0][:, :, :sinks] = view.rotation(keys, 0)
            self._buffers[1][:, :, :sinks] = values
        for row, spans in enumerate(self._wanted):
            stop = sinks + self._block * len(spans)
            index = torch.tensor([self._slots[row][span] for span in spans], dtype=torch.long)
            index = index.to(self._pool[0].device)
            for pool, buffer in zip(self._pool, self._buffers, strict=True):
                if stop < length:
                    buffer[row, :, stop:] = 0
                _gather(pool[row], index, buffer[row, :, sinks:stop])
        return self._buffers


def _runs(spans: Sequence[Span]) -> list[Span]:
    """Return spans, in order, as one where one ends where the next begins."""
    found: list[Span] = []
    for begin, stop in spans:
        if found and found[-1][1] == begin:
            begin = found.pop()[0]
        found.append((begin, stop))
    return found


def _gather(held: Tensor, index: Tensor, out: Tensor) -> None:
    """Write the given slots, of (heads, slots, block * d), as tokens, (heads, n, d), each head's together."""
    if held.device.type != "cpu":
        out.copy_(held.index_select(1, index).view(out.shape))
        return
    for of_head, into in zip(held, out, strict=True):  # without a copy between
        torch.index_select(of_head, 0, index, out=into.view(len(index), of_head.shape[1]))
