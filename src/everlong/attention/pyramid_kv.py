"""PyramidKV: SnapKV with more for the lower layers, less for the upper ones."""

from __future__ import annotations

from dataclasses import dataclass

from everlong.attention.policy import POLICIES, require_count
from everlong.attention.snap_kv import SnapKV


@POLICIES.register("pyramid-kv")
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """PyramidKV: Dynamic Cache Compression by Pyramidal Information Funneling (arXiv 2406.02069, 2024).

    What is kept, what a query sees, at which positions and what is forgotten: as :class:`SnapKV` has it, but
    the budget is that of the layers' mean. Beside sinks and observing tokens, the last layer keeps one
    `slope`-th of what the mean has, the first what is left of twice the mean, and those between fall in equal
    steps. Where the first would get more than there is, it keeps all, and the last the more. Layers that keep
    a window of their own do not count.

    Parameters
    ----------
    budget : int or Bytes, optional
        Tokens kept in each head, in the mean over layers, sinks and observing ones included; by default 1024,
        or as `ratio` says.
    ratio : float, optional
        The share of what is held that is kept, in the mean, in (0, 1], instead of a budget.
    observed, pooled, sinks : int
        As of :class:`SnapKV`: latest tokens, whose attention decides; neighbours that are weighed as one; and
        first tokens kept whatever they receive.
    slope : int
        The paper's beta, 20 there: the larger, the steeper. 1: as SnapKV.
    """

    slope: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("PyramidKV", "slope", self.slope, least=1)

    def budgets(self, tokens: int, layers: int) -> list[int]:
        """Return budgets that fall linearly with depth, about `budget` in the mean."""
        fixed = self.sinks + self.observed
        mean = self.budget_of(tokens) - fixed
        last = mean // self.slope
        first = 2 * mean - last
        if first > tokens - fixed:
            first = max(mean, tokens - fixed)
            last = 2 * mean - first
        if layers == 1 or last >= first:
            return [fixed + mean] * layers
        return [fixed + first - (first - last) * depth // (layers - 1) for depth in range(layers)]
