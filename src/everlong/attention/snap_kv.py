"""SnapKV: what the end of the input looked at, chosen once when it was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.attention.cache import StreamCache
from everlong.attention.choosing import ChoosingPolicy
from everlong.attention.kept import KeptMemory
from everlong.attention.kept_view import AT, KeptView
from everlong.attention.policy import POLICIES, require_count, require_share
from everlong.attention.positions import Rotation
from everlong.attention.received import QUERIES, SINK_LOGITS, Weighing, note_queries, weigh
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError

_BUDGET = 1024


@POLICIES.register("snap-kv")
@dataclass(frozen=True)
class SnapKV(ChoosingPolicy):
    """SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469, NeurIPS 2024).

    What is kept: while the input is read, all of it. When it has been read, in each layer, row and key-value
    head: the latest `observed` tokens, and of those before them the ones that received most attention from
    these; softmax weights in float32, summed over queries and over the query heads that share the key, and of
    each token and its neighbours, `pooled` together, the largest. What is written or read afterwards is kept,
    and weighed with the rest when the next input has been read. What a query sees: what its head kept. At
    which positions: their true ones. What is forgotten: the rest, for good, each time reading ends.

    It saves memory and time while writing; reading costs as much as with full attention, and beyond the
    training length a model fails under SnapKV as it does without. The question is part of what is observed:
    input that does not end in what is asked is weighed by its own last words.

    Works in sessions, which tell when reading ends; under ``attach`` with a cache of one's own, whose
    ``end_of_prefill()`` is called between reading and writing.

    Parameters
    ----------
    budget : int, optional
        Tokens kept in each head, sinks and observing ones included; by default 1024, or as `ratio` says.
    ratio : float, optional
        The share of what is held that is kept, in (0, 1], instead of a budget. At least the sinks and the
        observing tokens are kept, and one more.
    observed : int
        Latest tokens, whose attention decides; 32 in the paper.
    pooled : int
        Neighbours that are weighed as one, an odd number; 7 in the paper.
    sinks : int
        First tokens kept whatever they receive; 0 in the paper.
    """

    needs_end_of_prefill: ClassVar[bool] = True
    is_query_aware: ClassVar[bool] = True

    budget: int | None = None
    ratio: float | None = None
    observed: int = 32
    pooled: int = 7
    sinks: int = 0

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_count(name, "budget", self.budget, least=1, optional=True)
        require_count(name, "observed", self.observed, least=1)
        require_count(name, "pooled", self.pooled, least=1)
        require_count(name, "sinks", self.sinks, least=0)
        if self.pooled % 2 == 0:
            raise ConfigurationError(f"{name}: pooled={self.pooled} must be odd: as many on either side")
        if self.ratio is not None:
            require_share(name, "ratio", self.ratio)
            if self.budget is not None:
                raise ConfigurationError(f"{name}: give a budget in tokens or a ratio, not both")
        least = self.sinks + self.observed
        if self.ratio is None and (_BUDGET if self.budget is None else self.budget) <= least:
            raise ConfigurationError(
                f"{name}: a budget of {self.budget or _BUDGET} cannot hold {self.sinks} sinks, "
                f"{self.observed} observing tokens and one to choose; use budget={least + 1} or more"
            )

    def budget_of(self, tokens: int) -> int:
        """Return how many of a row's `tokens` are kept."""
        if self.ratio is None:
            return _BUDGET if self.budget is None else self.budget
        return max(self.sinks + self.observed + 1, round(self.ratio * tokens))

    def budgets(self, tokens: int, layers: int) -> list[int]:
        """Return how many of a row's `tokens` each of the layers keeps, from the first on."""
        return [self.budget_of(tokens)] * layers

    def plain_until(self) -> int | None:
        """All that is kept is seen."""
        return None

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Note the latest queries."""
        assert isinstance(view, KeptView)
        if view.is_own:
            note_queries(queries, view, self.observed)

    def end_of_prefill(self, cache: StreamCache) -> None:
        """Choose what to keep."""
        memories = [m for m in cache.memories.values() if isinstance(m, KeptMemory) and QUERIES in m.index]
        pads = cache.pads or (0,) * (cache.rows or 1)
        held = [
            [int((at >= pad).sum()) for at, pad in zip(memory.index[AT][:, 0], pads, strict=True)]
            for memory in memories
        ]
        # Once layers hold different numbers, budgets are of the largest, and shares of the mean.
        wholes = [max(row) if self.ratio is None else round(fmean(row)) for row in zip(*held, strict=True)]
        for depth, (memory, tokens) in enumerate(zip(memories, held, strict=True)):
            budgets = [self.budgets(whole, len(memories))[depth] for whole in wholes]
            if any(budget < held for budget, held in zip(budgets, tokens, strict=True)):
                with torch.no_grad():
                    self._compress(memory, pads, [*map(min, budgets, tokens)])

    def _compress(self, memory: KeptMemory, pads: Sequence[int], budgets: Sequence[int]) -> None:
        """Keep so many tokens of each row."""
        at = memory.index[AT]
        pad = torch.tensor(pads, device=at.device)[:, None, None]
        worth = self.worth(memory, pad)
        stays = (at >= memory.seen - self.observed) | (at < pad + self.sinks)
        memory.keep(worth.masked_fill(stays, torch.inf).masked_fill(at < pad, -torch.inf), budgets)

    def worth(self, memory: KeptMemory, pad: Tensor) -> Tensor:
        """Return what the tokens before the observing ones are worth, (batch, key-value heads, held)."""
        assert memory.keys is not None
        queries, at, index = memory.index[QUERIES], memory.index[AT], memory.index
        n, seen = queries.shape[2], memory.seen
        rotation = Rotation(memory.frequencies, memory.layout)
        placed = rotation(queries, range(memory.frame(seen - n), memory.frame(seen)))
        own = torch.arange(seen - n, seen, device=at.device)[:, None]
        first = at[:, :1, None]
        dead = pad[..., None]
        visible = (first >= dead) & (first <= own) & (own >= dead)
        how = Weighing(memory.scaling, memory.softcap, index.get(SINK_LOGITS))
        received = weigh(placed, memory.keys[:, :, : memory.held], None, visible, how)[1].float()
        before = received[..., : memory.held - n]
        if before.shape[-1]:
            before = F.max_pool1d(before, self.pooled, 1, self.pooled // 2)
        return torch.cat((before, received[..., memory.held - n :]), -1)
