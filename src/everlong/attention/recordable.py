"""What steps that are recorded have in common: the cache they are given, and what they are held against.

That cache stays the same from token to token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.cache_interface import PolicyCache
from everlong.attention.forward import Layers, Underway
from everlong.attention.inputs import Inputs
from everlong.errors import InputError
from everlong.models.adapters import Span

ROUNDED = 2e-2
"""How far numbers in half precision may be apart, as a share of the largest one."""

Run = Callable[[PolicyCache, Tensor], Tensor]
"""Runs ids, shape (rows, 1), through the model with a cache, and returns an output of the same rows."""

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}

Step = TypeVar("Step")


class RecordableStep(PolicyCache):
    """The tokens of a step and their positions, in tensors that are written before it is run.

    Parameters
    ----------
    cache : StreamCache
        What the tokens are written on.
    device : torch.device
        Where the model takes them.
    position_rows : int
        1 where all rows stand at one position, or else as many as there are rows.

    Attributes
    ----------
    ids : Tensor (rows, 1)
        The tokens to run.
    adapter : str or None
        The adapter it runs with.
    """

    def __init__(self, cache: StreamCache, device: torch.device, position_rows: int) -> None:
        super().__init__(cache.owner)
        self.adapter = cache.adapter
        self._layer_count = len(cache.memories)
        with torch.inference_mode(False):  # later steps, in whatever mode, write into them
            self.ids = torch.zeros((cache.rows or 0, 1), dtype=torch.long, device=device)
            self._positions = torch.zeros((position_rows, 1), dtype=torch.long, device=device)
        self._latest = [0] * position_rows

    def place(self, ids: Tensor, positions: list[int]) -> None:
        """Write the tokens and their position ids."""
        self.ids.copy_(ids)
        if positions != self._latest:
            self._positions.copy_(torch.tensor(positions)[:, None])
            self._latest = positions

    def positions(self, device: torch.device) -> Tensor:
        """Position ids, shape (1 or rows, 1), written by :meth:`place`."""
        return self._positions

    def adapters(self, rows: int, tokens: int) -> list[Span]:
        """Return the adapter of all tokens of a forward."""
        return [(self.adapter, rows * tokens)]

    def begin(self, inputs: Inputs, layers: Layers, outer: Underway | None) -> Underway:
        """Enter a forward."""
        raise NotImplementedError

    def enter(self, inputs: Inputs) -> None:
        """Make ready for a forward of these tokens."""
        if (inputs.rows, inputs.tokens) != tuple(self.ids.shape):
            raise InputError(f"a recorded step takes {len(self.ids)} rows of one token")
        self._in_forward = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Nothing that changes from step to step."""
        return 0

    def __len__(self) -> int:
        return self._layer_count


@dataclass(eq=False)
class Recorded(Generic[Step]):
    """What is known of the next steps of a cache.

    Attributes
    ----------
    output : str
        What the step returns.
    model_state : int
        The model's, as its watch numbers them.
    step : StaticStep or OpenStep
        The step.
    eager : int
        How many were run eagerly; enough of them where a recording goes on in larger buffers.
    replay : callable or None
        Repeats it; None: it is not recorded yet.
    result : Tensor or None
        Where its output is then.
    seen : int
        Tokens that the cache had seen after it was last repeated.
    glance : tuple or None
        What the model showed at a glance before it was last looked at.
    """

    output: str
    model_state: int
    step: Step
    eager: int = 0
    replay: Callable[[], None] | None = None
    result: Tensor | None = None
    seen: int = -1
    glance: tuple[int, int, bool] | None = None


def is_plain(cache: StreamCache, ids: Tensor, owner: str) -> bool:
    """Whether nothing here is in a recorded step's way: otherwise it runs eagerly, or is refused there."""
    return (
        cache.owner == owner
        and cache.is_settled
        and not cache.unfit
        and ids.shape == (cache.rows, 1)
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(ids.device.type)
    )


def agree(ours: Tensor, theirs: Tensor, tolerance: float | None = None) -> bool:
    """Whether two steps gave the same, up to a share of the largest number; None: as their dtype rounds."""
    if torch.equal(ours, theirs):  # sooner said than by how much they differ
        return True
    if tolerance is None:
        tolerance = _TOLERANCE.get(theirs.dtype, ROUNDED)
    error, size = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    return bool(error <= tolerance * size)
