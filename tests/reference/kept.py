"""What each key-value head keeps, by definition: H2O, SirLLM, InfiniPot, SnapKV, PyramidKV, token by token.

A row is read alone. Queries attend in groups: what a head holds changes before a group, never within one.
Lists, loops and float64; nothing is taken from the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .attention import Rotation

Kind = Literal["h2o", "sir-llm", "infini-pot", "snap-kv"]
_UNKNOWN = 1e6


@dataclass(frozen=True)
class KeptSpec:
    """A method, and how a row was read.

    Attributes
    ----------
    kind
        The method; `"snap-kv"` also is PyramidKV.
    window
        Tokens that a query finds at most; None: no limit.
    sinks, recent
        First and latest tokens that stay. For SnapKV and InfiniPot the latest also decide.
    compressed
        For InfiniPot: what a compression leaves.
    pooled
        For SnapKV: keys that are weighed as one.
    budgets
        For SnapKV: of each layer.
    groups
        Where groups of queries begin, ascending from 0.
    chunks
        Where forwards begin: the surprisal of tokens from there on is not known.
    ends
        For SnapKV: after how many tokens reading ended.
    turns
        For SirLLM: after how many tokens scores were multiplied by `decay`.
    decay
        That factor.
    surprisal
        Of each token.
    """

    kind: Kind
    window: int | None = None
    sinks: int = 0
    recent: int = 0
    compressed: int = 0
    pooled: int = 1
    budgets: tuple[int, ...] = ()
    groups: tuple[int, ...] = (0,)
    chunks: tuple[int, ...] = (0,)
    ends: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()
    decay: float = 1.0
    surprisal: tuple[float, ...] = ()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rotation: Rotation, scale: float, layer: int
    ) -> Tensor:
        """Attend over one row: query (heads, n, d), key and value (key-value heads, n, d), not rotated."""
        query, key, value = query.double(), key.double(), value.double()
        share = len(query) // len(key)
        output = [
            _Head(self, query[h * share : (h + 1) * share], key[h], value[h], rotation, scale, layer).read()
            for h in range(len(key))
        ]
        return torch.cat(output)


class _Head:
    """One key-value head with the query heads (g, n, d) that share it."""

    def __init__(
        self,
        spec: KeptSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: Rotation,
        scale: float,
        layer: int,
    ) -> None:
        self.spec, self.query, self.key, self.value = spec, query, key, value
        self.rotation, self.scale, self.layer = rotation, scale, layer
        self.kept: list[int] = []
        self.received: dict[int, float] = {}
        self.placed: dict[tuple[int, int], Tensor] = {}

    def read(self) -> Tensor:
        spec, n = self.spec, self.query.shape[1]
        output = torch.zeros(*self.query.shape[:2], self.value.shape[1], dtype=torch.float64)
        cuts = sorted({*spec.groups, *spec.ends, n} & set(range(n + 1)))
        for first, stop in pairwise(cuts):
            if first in spec.ends:
                self.snap(first)
            if spec.window is not None and len(self.kept) + stop - first > spec.window:
                self.make_room(first, stop)
            cache = [*self.kept, *range(first, stop)]
            for i in range(first, stop):
                sees = [j for j in cache if j <= i]
                weights = self.weights(i, sees, cache)
                output[:, i] = weights @ self.value[sees]
                for j, weight in zip(sees, weights.sum(0).tolist(), strict=True):
                    self.received[j] = self.received.get(j, 0.0) + weight
            self.kept = cache
        return output

    def weights(self, i: int, sees: Sequence[int], cache: Sequence[int]) -> Tensor:
        """Softmax weights (g, len(sees)) of query i."""
        in_cache = self.spec.kind in ("sir-llm", "infini-pot")
        at = {j: place for place, j in enumerate(cache)} if in_cache else {j: j for j in cache}
        query = self.rotation(self.query[:, i], at[i])
        keys = torch.cat([self.placed_key(j, at[j]) for j in sees])
        return torch.softmax(query @ keys.T * self.scale, dim=1)

    def placed_key(self, j: int, at: int) -> Tensor:
        """Key j (1, d), rotated to a position; each is computed once."""
        if (j, at) not in self.placed:
            self.placed[j, at] = self.rotation(self.key[None, j], at)
        return self.placed[j, at]

    def make_room(self, first: int, stop: int) -> None:
        spec = self.spec
        assert spec.window is not None
        if spec.kind == "infini-pot":
            self.boil_down(first)
            return
        chunk = max(at for at in spec.chunks if at <= first)
        while len(self.kept) + stop - first > spec.window:
            can_go = [j for j in self.kept if spec.sinks <= j < stop - spec.recent]
            worth = {
                j: self.received[j] if spec.kind == "h2o" else self.surprisal(j, chunk, first) for j in can_go
            }
            self.kept.remove(min(can_go, key=lambda j: (worth[j], -j)))

    def surprisal(self, j: int, chunk: int, now: int) -> float:
        if j >= chunk:
            return _UNKNOWN + j
        turns = sum(j < turn <= now for turn in self.spec.turns)
        return self.spec.surprisal[j] * self.spec.decay**turns

    def boil_down(self, first: int) -> None:
        spec, kept = self.spec, self.kept
        chunk = max(at for at in spec.chunks if at <= first)
        latest = [j for j in kept if j >= first - spec.recent]
        caught = dict.fromkeys(kept, 0.0)
        for i in latest:
            sees = [j for j in kept if j <= i]
            for j, weight in zip(sees, self.weights(i, sees, kept).sum(0).tolist(), strict=True):
                caught[j] += weight
        stays = {j for j in kept if j < spec.sinks} | set(latest)
        room = spec.compressed - spec.sinks - spec.recent
        rest = sorted((j for j in kept if j not in stays), key=lambda j: (-caught[j], j))
        stays |= set(rest[: (room + 1) // 2])
        rest = sorted(rest[(room + 1) // 2 :], key=lambda j: (-self.surprisal(j, chunk, first), j))
        stays |= set(rest[: spec.compressed - len(stays)])
        self.kept = sorted(stays)

    def snap(self, now: int) -> None:
        spec, kept = self.spec, self.kept
        budget = spec.budgets[self.layer]
        if len(kept) <= budget:
            return
        latest = kept[-spec.recent :]
        caught = dict.fromkeys(kept, 0.0)
        for i in latest:
            sees = [j for j in kept if j <= i]
            for j, weight in zip(sees, self.weights(i, sees, kept).sum(0).tolist(), strict=True):
                caught[j] += weight
        before, reach = kept[: -spec.recent], spec.pooled // 2
        pooled = {
            j: max(caught[x] for x in before[max(0, place - reach) : place + reach + 1])
            for place, j in enumerate(before)
        }
        stays = {j for j in kept if j < spec.sinks} | set(latest)
        rest = sorted((j for j in before if j not in stays), key=lambda j: (-pooled[j], j))
        self.kept = sorted(stays | set(rest[: budget - len(stays)]))
