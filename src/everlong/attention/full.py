"""Full attention: everything is kept and seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from everlong.attention.policy import POLICIES, require_count
from everlong.attention.window import WindowPolicy


@POLICIES.register("full")
@dataclass(frozen=True)
class FullAttention(WindowPolicy):
    """The stock model's attention, through our seam; the cache grows with the stream.

    What is kept: every key. What a query sees: every key before it. At which positions: its true
    distance, or at most `ceiling`. What is forgotten: nothing.

    Parameters
    ----------
    ceiling : int, optional
        A distance above it counts as it: LM-Infinite's ablation "ceiling without Λ mask"
        (arXiv 2308.16137). None: true distances.
    """

    forgets: ClassVar[bool] = False

    ceiling: int | None = None

    def __post_init__(self) -> None:
        require_count("FullAttention", "ceiling", self.ceiling, least=0, optional=True)

    def shape(self) -> tuple[int, int | None]:
        """No sinks, everything local."""
        return 0, None

    def local_ceiling(self) -> int | None:
        """Apply the ceiling to all keys."""
        return self.ceiling
