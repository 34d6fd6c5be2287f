"""StreamingLLM: attention sinks, and positions inside the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from everlong.attention.policy import POLICIES, require_count
from everlong.attention.window import WindowPolicy
from everlong.errors import ConfigurationError


@POLICIES.register("streaming-llm")
@dataclass(frozen=True)
class StreamingLLM(WindowPolicy):
    """Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024, arXiv 2309.17453).

    What is kept: the first `sinks` tokens and the latest ``window - sinks``. What a query sees: those.
    At which positions: their index among the kept ones, so that sink j stands at distance
    ``window - 1 - j`` once the window is full. What is forgotten: the middle, for good.

    Parameters
    ----------
    sinks : int
        G, first tokens kept; 4 in the paper.
    window : int, optional
        W, all keys a query sees, itself and the sinks included; the model's training length by default.
    """

    sinks: int = 4
    window: int | None = None

    def __post_init__(self) -> None:
        require_count("StreamingLLM", "sinks", self.sinks, least=0)
        require_count("StreamingLLM", "window", self.window, least=1, optional=True)
        if self.window is not None and self.window <= self.sinks:
            raise ConfigurationError(
                f"StreamingLLM: a window of {self.window} cannot hold {self.sinks} sinks and a local token; "
                f"use window={self.sinks + 1} or more"
            )

    def shape(self) -> tuple[int, int | None]:
        """`sinks` sinks, the rest of the window local."""
        assert self.window is not None, "resolve() comes first"
        return self.sinks, self.window - self.sinks

    def near_until(self) -> int | None:
        """All sinks begin to keep their distance when the window is full."""
        return self.window

    def far_from(self) -> int | None:
        """All sinks at once."""
        return self.window

    def far_distances(self) -> Sequence[int]:
        """Sink j stays at index j of the window."""
        assert self.window is not None
        return range(self.window - 1, self.window - 1 - self.sinks, -1)

    def sink_is_far(self, row_index: Tensor, sink: Tensor) -> Tensor:
        """From the moment the window is full."""
        assert self.window is not None
        return (row_index >= self.window) & (sink >= 0)
