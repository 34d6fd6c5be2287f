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

Angles = tuple[Tensor, Tensor] | None
"""Tables of cos and sin; None: a layer without rotary positions."""


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
        if isinstance(positions, int) and positions == 0 and self.is_nothing_at_0:
            return x
        return self.turned(x, self.angles(positions, x))

    @property
    def is_nothing_at_0(self) -> bool:
        """Whether what stands at 0 is not changed: R(0) scales where cos and sin do."""
        return self.frequencies is None or self.frequencies.scaling == 1

    def angles(self, positions: Positions, like: Tensor) -> Angles:
        """Return what rotates a tensor such as `like` to `positions`; None: there is nothing to rotate."""
        if self.frequencies is None:
            return None
        if isinstance(positions, Tensor):
            return self.frequencies.angles(positions, self.layout, like.device, working_dtype(like))
        key = (id(self.frequencies), self.layout, positions, like.device)
        if key not in self._memo:
            self._memo[key] = self.frequencies.angles(
                positions, self.layout, like.device, working_dtype(like)
            )
        angles: Angles = self._memo[key]
        return angles

    def turned(self, x: Tensor, angles: Angles) -> Tensor:
        """Rotate raw `x` by what :meth:`angles` returned."""
        return x if angles is None else rotate(x, *angles, self.layout)

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
