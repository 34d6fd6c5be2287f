"""Stream positions, rebased to a bounded frame before an angle is computed.

Stream positions are Python integers. What a layer stores is rotated at *position minus the frame's
origin*; the origin follows the window, at most once per :data:`FRAME` tokens, so that the
two-hundred-millionth token is as exact as the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from everlong.models.rotary import Frequencies, Layout, Positions, rotate

FRAME = 2**16
"""Tokens after which a bounded window's keys are rotated back towards the origin."""


class Rotation:
    """Rotates the queries and keys of one layer; angles are shared by all layers of one forward.

    Parameters
    ----------
    frequencies : Frequencies or None
        The layer's table; None: the layer has no rotary positions and nothing is rotated.
    layout : {"halves", "interleaved"}
        Which dimensions form a pair.
    memo : dict, optional
        Where angles of integer and range positions are remembered, for as long as a forward lasts.
    """

    def __init__(
        self, frequencies: Frequencies | None, layout: Layout, memo: dict[Any, Any] | None = None
    ) -> None:
        self.frequencies = frequencies
        self.layout = layout
        self._memo = {} if memo is None else memo

    def __call__(self, x: Tensor, positions: Positions) -> Tensor:
        """Rotate raw `x`, shape (batch, heads, n, d), to `positions` of the frame."""
        if self.frequencies is None or (
            isinstance(positions, int) and positions == 0 and self.frequencies.scaling == 1
        ):
            return x
        if isinstance(positions, Tensor):
            cos, sin = self.frequencies.angles(positions, self.layout, x.device, working_dtype(x))
        else:
            key = (id(self.frequencies), self.layout, positions, x.device)
            if key not in self._memo:
                self._memo[key] = self.frequencies.angles(positions, self.layout, x.device, working_dtype(x))
            cos, sin = self._memo[key]
        return rotate(x, cos, sin, self.layout)

    def move(self, x: Tensor, by: int) -> Tensor:
        """Rotate `x`, which is rotated already, by `by` positions more (negative: back)."""
        if self.frequencies is None:
            return x
        unscaled = Frequencies(self.frequencies.inverse, 1.0)
        cos, sin = unscaled.angles(by, self.layout, x.device, working_dtype(x))
        return rotate(x, cos, sin, self.layout)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return raw keys from `x`, which stands rotated at `positions` of the frame."""
        if self.frequencies is None:
            return x
        unscaled = Frequencies(self.frequencies.inverse, 1.0)
        cos, sin = unscaled.angles(-positions, self.layout, x.device, working_dtype(x))
        return rotate(x, cos, sin, self.layout) / self.frequencies.scaling


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to rotate and to add up attention in: float32, or float64 for float64 models."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
