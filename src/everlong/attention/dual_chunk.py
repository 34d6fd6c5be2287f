"""Dual Chunk Attention: chunks of a stream that all begin at the same position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part, Partial
from everlong.attention.placing import placed_keys, placed_queries, row_indices
from everlong.attention.policy import POLICIES, Policy, require_count
from everlong.attention.view import LayerCall, LayerView, Queries
from everlong.errors import ConfigurationError


@POLICIES.register("dual-chunk")
@dataclass(frozen=True)
class DualChunk(Policy):
    """Training-Free Long-Context Scaling of Large Language Models (An et al., ICML 2024, arXiv 2402.17463).

    What is kept: every key. What a query sees: every key before it. At which positions: key k at ``k mod s``;
    query q at ``q mod s`` for keys of its own chunk of s tokens, at ``min(q mod s + s, c - 1)`` for those of
    the chunk before, at ``c - 1`` for all others. What is forgotten: nothing; memory grows with the stream.

    Up to s tokens it is full attention. No distance is c or more, however long the input.

    Parameters
    ----------
    chunk : int, optional
        s; three quarters of `positions` by default, as in the paper.
    positions : int, optional
        c, positions that the model knows; its training length by default.
    """

    forgets: ClassVar[bool] = False

    chunk: int | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        require_count("DualChunk", "chunk", self.chunk, least=1, optional=True)
        require_count("DualChunk", "positions", self.positions, least=2, optional=True)
        if self.chunk is not None and self.positions is not None and self.chunk >= self.positions:
            raise ConfigurationError(
                f"DualChunk: a chunk of {self.chunk} leaves none of {self.positions} positions for the chunk "
                f"after it; use chunk={self.positions * 3 // 4} or less"
            )

    def resolve(self, training_length: int | None) -> Self:
        """Fill in the positions, and from them the chunk."""
        positions = self.positions or training_length
        if positions is None:
            raise ConfigurationError(
                "the model does not name its training length: pass DualChunk(positions=...)"
            )
        return replace(self, positions=positions, chunk=self.chunk or max(1, positions * 3 // 4))

    @property
    def _sizes(self) -> tuple[int, int]:
        assert self.chunk is not None and self.positions is not None, "resolve() comes first"
        return self.chunk, self.positions

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory, whose keys stand in their chunks."""
        return ChunkMemory(self._sizes[0], start)

    def breaks(self) -> tuple[int, ...]:
        """End groups where the first chunk ends."""
        return (self._sizes[0],)

    def plain_until(self) -> int | None:
        """Return s: the first chunk is full attention."""
        return self._sizes[0]

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Show the chunk that a query is in, the one before, and all others."""
        size, positions = self._sizes
        pads = view.pads or (0,)
        first = max(0, queries.first - max(pads)) // size
        last = max(0, queries.stop - 1 - min(pads)) // size
        if not last:
            return [view.all_slots(queries)] if view.new is None else [*view.band(queries)]
        edges = _Edges(size, first, last, queries, view)
        parts: list[Part | Partial] = []
        if edges.are_clear:
            parts += view.band(queries, lowest=first * size)
        else:
            parts += edges.part(queries.placed, 0, 0)
        parts += edges.part(
            placed_queries(queries, view, lambda index: (index % size + size).clamp(max=positions - 1)), 1, 1
        )
        return [*parts, *edges.part(queries.at(positions - 1), 2, None)]


@dataclass(frozen=True, eq=False)
class _Edges:
    """Where chunks lie for a group of queries.

    Attributes
    ----------
    size : int
        Tokens of a chunk.
    first, last : int
        Chunks of the queries, in whatever row: the earliest, and the latest.
    queries : Queries
        The group.
    view : LayerView
        The keys.
    """

    size: int
    first: int
    last: int
    queries: Queries
    view: LayerView

    @property
    def are_clear(self) -> bool:
        """Whether all queries are in one chunk, which begins at the same index in all rows."""
        return self.first == self.last and not self.view.pads

    def part(self, placed: Tensor, nearest: int, farthest: int | None) -> list[Part]:
        """Show queries, rotated, the keys of chunks so many before their own: none, or one part."""
        pads, queries = self.view.pads or (0,), self.queries
        begin = 0 if farthest is None else max(0, self.first - farthest) * self.size + min(pads)
        stop = min(queries.stop, (self.last - nearest + 1) * self.size + max(pads))
        if self.last < nearest or stop <= begin:
            return []
        visible = None if self.are_clear else self._visible(begin, stop, nearest, farthest)
        return [Part(placed, self.view.keys(begin, stop), self.view.values(begin, stop), visible)]

    def _visible(self, begin: int, stop: int, nearest: int, farthest: int | None) -> Tensor:
        """Return which query sees which key, (batch or 1, 1, n, m)."""
        device, memo = self.queries.raw.device, self.view.call.memo
        ends = self.queries.first, self.queries.stop, begin, stop
        key = "chunks", self.size, *ends, nearest, farthest, device
        if key not in memo:
            row_index = self.view.row_index(self.queries)
            index = torch.arange(begin, stop, device=device) - self.view.pad_column(device)
            before = row_index // self.size - index // self.size
            visible = (index >= 0) & (index <= row_index) & (before >= nearest)
            memo[key] = visible if farthest is None else visible & (before <= farthest)
        found: Tensor = memo[key]
        return found


class ChunkMemory(LayerMemory):
    """All tokens, each rotated once, to its place in its chunk.

    Parameters
    ----------
    chunk : int
        s, tokens of a chunk, counted in each row from its first real token.
    start : int
        Stream position of the first token.
    """

    def __init__(self, chunk: int, start: int) -> None:
        super().__init__(0, None, start=start)
        self.chunk = chunk

    def rotated(self, x: Tensor, begin: int, call: LayerCall) -> Tensor:
        """Rotate raw queries or keys of the tokens from `begin` on to their places in their chunks."""
        if call.pads and any(call.pads):
            self.index["pads"] = torch.tensor(call.pads)
        return placed_keys(x, begin, call, lambda index: index % self.chunk)

    def places(self) -> Tensor:
        """Return where each key stands, shape (n,) or (batch, n)."""
        pads = self.index.get("pads")
        return row_indices(0, self.held, None if pads is None else tuple(pads.tolist())) % self.chunk
