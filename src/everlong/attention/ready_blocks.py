"""Recalled blocks made ready for attention, where they are small and each head has many of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from everlong.attention.ready import Choice, ReadyTokens, Span
from everlong.attention.tiers import BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence

    from everlong.attention.view import LayerView


class ReadyBlocks(ReadyTokens):
    """The same as its base, in few operations for many spans; of what was wanted before it keeps nothing.

    What is read is read together where the tier keeps it together.
    """

    def _row(self, row: int, choice: Choice, view: LayerView) -> tuple[Tensor, Tensor]:
        """Return keys and values of one row's choice: those that are held are copied, others read."""
        pad = view.pads[row] if view.pads else 0
        held = [self._places(row, which, len(choice)) for which in range(len(choice))]
        missing = {span for spans, at in zip(choice, held, strict=True) for span in spans if span not in at}
        pieces = [] if self._held is None else [(self._held[0][row], self._held[1][row])]
        places: dict[Span, int] = {}
        begin = sum(keys.shape[1] for keys, _ in pieces)
        for low, high, spans in _together(missing):
            keys, values = view.middle(low + pad, high + pad)
            pieces.append((keys[row], values[row]))
            places |= {span: begin + span[0] - low for span in spans}
            begin += high - low
        if not pieces:  # nothing is wanted
            return super()._row(row, choice, view)
        keys, values = (torch.cat(some, 1) for some in zip(*pieces, strict=True))
        wanted = [_indices(spans, at | places) for spans, at in zip(choice, held, strict=True)]
        index = torch.stack(wanted).to(keys.device)[..., None].expand(len(keys), -1, -1)
        return (
            keys.gather(1, index.expand(-1, -1, keys.shape[2])),
            values.gather(1, index.expand(-1, -1, values.shape[2])),
        )

    def _set_aside(self, wanted: Sequence[Choice], heads: int) -> None:
        """Keep nothing."""


def _together(spans: set[Span]) -> list[tuple[int, int, list[Span]]]:
    """Return spans in runs, with where each run begins and stops: what lies less than a block apart."""
    runs: list[tuple[int, int, list[Span]]] = []
    for span in sorted(spans):
        if runs and span[0] < runs[-1][1] + BLOCK:
            begin, stop, some = runs[-1]
            runs[-1] = begin, max(stop, span[1]), [*some, span]
        else:
            runs.append((*span, [span]))
    return runs


def _indices(spans: Sequence[Span], places: dict[Span, int]) -> Tensor:
    """Return where the tokens of spans lie, one behind the other."""
    if not spans:
        return torch.zeros(0, dtype=torch.long)
    size = spans[0][1] - spans[0][0]
    if all(stop - begin == size for begin, stop in spans):
        return (torch.tensor([places[span] for span in spans])[:, None] + torch.arange(size)).flatten()
    return torch.cat([torch.arange(stop - begin) + places[begin, stop] for begin, stop in spans])
