"""An attention policy of one's own, outside the package: all that is near, some of what is farther."""

from dataclasses import dataclass

import torch

from everlong.attention import POLICIES, Policy
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part
from everlong.errors import ConfigurationError


@POLICIES.register("dilated-window")
@dataclass(frozen=True)
class DilatedWindow(Policy):
    """A query sees the latest `near` tokens, and every `stride`-th of those before them, up to `window`.

    What is kept: the latest `window` tokens. At which positions: their true distance. What is forgotten:
    all that is older.
    """

    near: int = 8
    stride: int = 4
    window: int | None = None  # None: the model's training length

    def __post_init__(self):
        if self.near < 1 or self.stride < 1 or (self.window is not None and self.window < self.near):
            raise ConfigurationError(f"{self}: near and stride must be at least 1, window at least near")

    def memory(self, layer, start):
        return LayerMemory(sinks=0, local=self.window, start=start)

    def parts(self, queries, view):
        parts = view.band(queries, farthest=self.near - 1)
        low = max(view.first, queries.first - self.window + 1)  # the first query's farthest key
        high = queries.stop - self.near  # the last query's nearest key that is not near
        if high > low:
            device = queries.raw.device
            key = torch.arange(low, high, device=device)
            distance = torch.arange(queries.first, queries.stop, device=device)[:, None] - key
            visible = (distance >= self.near) & (distance < self.window) & (distance % self.stride == 0)
            visible = visible & (key >= view.pad_column(device))
            parts.append(Part(queries.placed, view.keys(low, high), view.values(low, high), visible))
        return parts
