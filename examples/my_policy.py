"""A policy of one's own: the nearest tokens all, older ones thinned out, the first ones always.

Importing this file registers it. Then ``make_policy("dilated", {"stride": 8})``, `attach`, `load` and the
command line know it like any other method. Run it to see it write: ``python examples/my_policy.py``.
"""

from dataclasses import dataclass

import torch

from everlong.attention import POLICIES, Policy
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part, Partial
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError


@POLICIES.register("dilated")
@dataclass(frozen=True)
class Dilated(Policy):
    """A dilated window with sinks and a ceiling; with ``stride=1`` it is LM-Infinite.

    What is kept: the first `sinks` tokens and the latest ``window - sinks``. What a query sees: the sinks,
    the latest `near` tokens, and of the others every `stride`-th. At which positions: their true distance,
    or ``window - 1`` if that is less. What is forgotten: what leaves the window.
    """

    sinks: int = 10
    window: int | None = None  # None: the model's training length
    near: int = 512
    stride: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 1 or self.stride < 1:
            raise ConfigurationError("Dilated: sinks and stride must be at least 1")
        if self.window is not None and self.window <= self.sinks:
            raise ConfigurationError(f"Dilated: use a window larger than the {self.sinks} sinks")

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Keep sinks and the whole window: what one query skips, another sees."""
        assert self.window is not None, "resolve() has filled it in"
        return LayerMemory(self.sinks, self.window - self.sinks, start=start)

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Show the sinks near or at the ceiling, then the thinned-out window."""
        assert self.window is not None
        local, device = self.window - self.sinks, queries.raw.device
        at = view.row_index(queries)  # each query's place in its row, shape (rows, 1, n, 1)
        is_far = at - torch.arange(self.sinks, device=device) >= self.window
        low = max(view.first, queries.first - local + 1)
        key = torch.arange(low, queries.stop, device=device) - view.pad_column(device)
        distance = at - key
        visible = (key >= self.sinks) & (distance >= 0) & (distance < local)
        visible &= (distance < self.near) | (key % self.stride == 0)
        return [
            view.sinks_near(queries, is_far),
            view.sinks_far(queries, [self.window - 1] * self.sinks, is_far),
            Part(queries.placed, view.keys(low, queries.stop), view.values(low, queries.stop), visible),
        ]


if __name__ == "__main__":
    import everlong

    llm = everlong.load("smollm2-135m", attention=Dilated(window=2048))
    session = llm.session()
    session.read("The river ran past the mill, and every morning the miller's daughter")
    print(session.generate(max_new_tokens=40).text)
