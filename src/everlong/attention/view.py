"""What the queries of one forward may see of a layer, handed to a policy as parts.

Indices count tokens of the batch from 0, padding included; a row's own index is the index minus its
padding. A `LayerView` answers in such indices; angles are its business.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from everlong.attention.branches import Branches
from everlong.attention.parts import Part
from everlong.attention.positions import Rotation
from everlong.kernels.blocks import Triangle

if TYPE_CHECKING:
    from everlong.attention.layer_memory import LayerMemory


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One layer in one forward.

    Attributes
    ----------
    layer : int
        The layer's number.
    rotation : Rotation
        Its table for this forward.
    pads : tuple of int or None
        Padding tokens before each row's first real one; None: no row has any.
    scaling : float
        Factor on the products of queries and keys.
    softcap, sink_logits : float or None, Tensor (heads,) or None
        The model's soft-cap on logits, and its logit per head that takes weight but has no value (gpt-oss).
    branches : Branches or None
        How the new tokens follow one another; None: each the one before.
    memo : dict
        What several layers of the forward have in common, by a key of the finder's.
    """

    layer: int
    rotation: Rotation
    pads: tuple[int, ...] | None = None
    scaling: float = 1.0
    softcap: float | None = None
    sink_logits: Tensor | None = None
    branches: Branches | None = None
    memo: dict[Any, Any] = field(default_factory=dict)


class Queries:
    """A group of queries that are attended together.

    Attributes
    ----------
    raw : Tensor
        Before rotation, shape (batch, heads, n, d).
    placed : Tensor
        Rotated at their own positions in the frame, same shape.
    first, stop : int
        Index of the first query, and the one after the last's.
    """

    def __init__(self, raw: Tensor, placed: Tensor, first: int, stop: int, rotation: Rotation) -> None:
        self.raw = raw
        self.placed = placed
        self.first = first
        self.stop = stop
        self._rotation = rotation
        self._at: dict[int, Tensor] = {}

    def at(self, position: int) -> Tensor:
        """Return the queries as if all stood at `position`: keys rotated to 0 are that far away."""
        if position not in self._at:
            self._at[position] = self._rotation(self.raw, position)
        return self._at[position]


class LayerView:
    """The keys and values of one layer during one forward.

    Attributes
    ----------
    memory : LayerMemory
        The layer's memory, the new tokens not yet settled (or, for a single token, settled already).
    call : LayerCall
        The layer and its rotation.
    stop : int
        Index after the last token.
    new : tuple of Tensor or None
        Rotated keys, values and raw keys of the tokens not yet settled.
    """

    def __init__(
        self,
        memory: LayerMemory,
        call: LayerCall,
        stop: int,
        new: tuple[Tensor, Tensor, Tensor] | None,
    ) -> None:
        self.memory = memory
        self.call = call
        self.rotation = call.rotation
        self.stop = stop
        self.new = new
        self.pads = call.pads if call.pads and any(call.pads) else None
        self.branches = call.branches
        self._lists: dict[str, Tensor] = {}

    def of(self, call: LayerCall) -> LayerView:
        """Return the same view for another layer, which shares these keys and values."""
        shared = copy.copy(self)
        shared.call = call
        return shared

    def queries(self, raw: Tensor, placed: Tensor, first: int) -> Queries:
        """Group queries that begin at index `first`."""
        stop = first + raw.shape[2] if self.branches is None else self.stop
        return Queries(raw, placed, first, stop, self.rotation)

    def place(self, raw_queries: Tensor) -> Tensor:
        """Rotate the last queries of the forward, shape (batch, heads, n, d), at their own positions."""
        if self.branches is not None:
            return self.rotation.turned(raw_queries, self.memory.branch_angles(raw_queries, self.call))
        return self.memory.rotated(raw_queries, self.stop - raw_queries.shape[2], self.call)

    # --- keys and values by index ------------------------------------------------------------------

    def keys(self, begin: int, stop: int) -> Tensor:
        """Rotated keys of tokens [begin, stop), which must still be at hand."""
        return self._slice("keys", 0, begin, stop)

    def values(self, begin: int, stop: int) -> Tensor:
        """Values of tokens [begin, stop)."""
        return self._slice("values", 1, begin, stop)

    def raw(self, begin: int, stop: int) -> Tensor:
        """Unrotated keys of tokens [begin, stop); only where the policy keeps them."""
        return self._slice("raw", 2, begin, stop)

    def middle(self, begin: int, stop: int) -> tuple[Tensor, Tensor]:
        """Raw keys and values of tokens [begin, stop), some or all of which may have left the window.

        Only where the policy keeps those; the first are behind as many tokens as it has sinks.
        """
        tier, sinks = self.memory.tier, self.memory.sinks
        assert tier is not None
        pieces, in_tier = [], sinks + len(tier)
        if begin < in_tier:
            pieces.append(tier.read(begin - sinks, min(stop, in_tier) - sinks))
        if stop > in_tier:
            begin = max(begin, in_tier)
            pieces.append((self.raw(begin, stop), self.values(begin, stop)))
        return _joined([keys for keys, _ in pieces]), _joined([values for _, values in pieces])

    @functools.cached_property
    def first(self) -> int:
        """Index of the first local token at hand."""
        return self.memory.first

    @property
    def wants_gradient(self) -> bool:
        """Whether a gradient flows into the new tokens."""
        return self.new is not None and any(x.requires_grad for x in self.new)

    def _slice(self, name: str, which: int, begin: int, stop: int) -> Tensor:
        assert self.first <= begin
        buffer = getattr(self.memory, name)
        if self.new is None:
            return _joined([buffer[:, :, run] for run in self.memory.runs(begin, stop)] or [buffer[:, :, :0]])
        if name not in self._lists:
            runs = [] if buffer is None else self.memory.runs(self.first, self.memory.seen)
            self._lists[name] = _joined([*(buffer[:, :, run] for run in runs), self.new[which]])
        return self._lists[name][:, :, begin - self.first : stop - self.first]

    # --- parts -------------------------------------------------------------------------------------

    def row_index(self, queries: Queries) -> Tensor:
        """Each query's index in its own row, shape (batch or 1, 1, n, 1), on the queries' device."""
        if self.branches is not None:
            index = (queries.first + self.branches.depths).to(queries.raw.device)
        else:
            index = torch.arange(queries.first, queries.stop, device=queries.raw.device)
        return index[None, None, :, None] - self.pad_column(queries.raw.device)

    def pad_column(self, device: torch.device) -> Tensor:
        """Each row's padding, shape (batch or 1, 1, 1, 1)."""
        return torch.tensor(self.pads or (0,), device=device)[:, None, None, None]

    def band(
        self,
        queries: Queries,
        *,
        nearest: int = 0,
        farthest: int | None = None,
        lowest: int = 0,
        distance: int | None = None,
    ) -> list[Part]:
        """Show each query the local keys whose distance lies in [nearest, farthest].

        Parameters
        ----------
        queries : Queries
            The group.
        nearest, farthest : int
            Distances in tokens; farthest None: no limit.
        lowest : int
            Only keys whose index in their row is at least this.
        distance : int, optional
            Place all these keys at this distance instead of their true one (needs raw keys).
        """
        if self.branches is not None:
            return [self._branched(queries, nearest, farthest, lowest, distance)]
        a, b = queries.first, queries.stop
        low = max(lowest + min(self.pads or (0,)), self.first)
        if farthest is not None:
            low = max(low, a - farthest)
        high = b - nearest
        if high <= low:
            return []
        place = queries.placed if distance is None else queries.at(distance)
        if self.pads and lowest + max(self.pads) > low:
            visible = _banded(a - low, b - a, high - low, nearest, farthest, place.device)
            index = torch.arange(low, high, device=place.device) - self.pad_column(place.device)
            return [self._part(place, low, high, distance, visible & (index >= lowest))]
        if b - a == 1:
            if self.new is None and distance is None:
                return [self._run(place, run) for run in self.memory.runs(low, high)]
            return [self._part(place, low, high, distance, None)]
        near = a - nearest  # from here on, a key is hidden from the first queries
        seen_by_all = low if farthest is None else max(low, b - farthest)  # before, from the last
        if seen_by_all > near:
            visible = _banded(a - low, b - a, high - low, nearest, farthest, place.device)
            return [self._part(place, low, high, distance, visible)]
        parts = [self._part(place, near, high, distance, Triangle.LOWER)]
        if seen_by_all < near:
            parts.append(self._part(place, seen_by_all, near, distance, None))
        if farthest is not None and low == a - farthest:
            parts.append(self._part(place, low, seen_by_all, distance, Triangle.UPPER))
        elif low < seen_by_all:
            visible = _banded(a - low, b - a, seen_by_all - low, nearest, farthest, place.device)
            parts.append(self._part(place, low, seen_by_all, distance, visible))
        return parts

    def _branched(
        self, queries: Queries, nearest: int, farthest: int | None, lowest: int, distance: int | None
    ) -> Part:
        """Show each token of a tree the keys of :meth:`band` at hand, and those of its own branch."""
        memory, device = self.memory, queries.raw.device
        assert self.branches is not None and self.new is not None
        begin, held, count = self.first, memory.seen - self.first, len(self.branches)
        key = "branched", begin, held, nearest, farthest, lowest, device
        if key not in self.call.memo:
            index = torch.cat((torch.arange(begin, memory.seen), memory.seen + self.branches.depths)).to(
                device
            )
            away = self.row_index(queries) - (index - self.pad_column(device))
            sees = torch.cat((torch.ones(count, held, dtype=torch.bool), self.branches.sees), 1).to(device)
            sees = sees & (away >= nearest) & (index - self.pad_column(device) >= lowest)
            self.call.memo[key] = sees if farthest is None else sees & (away <= farthest)
        place = queries.placed if distance is None else queries.at(distance)
        return self._part(place, begin, memory.seen + count, distance, self.call.memo[key])

    def _run(self, place: Tensor, run: slice) -> Part:
        """Show all queries the tokens in a run of slots, as they lie."""
        memory = self.memory
        assert memory.keys is not None and memory.values is not None
        return Part(place, memory.keys[:, :, run], memory.values[:, :, run])

    def _part(
        self, place: Tensor, begin: int, stop: int, distance: int | None, visible: Tensor | Triangle | None
    ) -> Part:
        keys = self.keys(begin, stop) if distance is None else self.raw(begin, stop)
        if distance is not None:  # R(0) is not the identity where cos and sin carry an attention scaling
            keys = self.rotation(keys, 0)
        return Part(place, keys, self.values(begin, stop), visible)

    def sinks_near(self, queries: Queries, far: Tensor | None) -> Part:
        """Show the sinks at their true distances, but not where `far` (batch or 1, 1, n, G) holds."""
        keys, values = self.sinks()
        device = keys.device
        of_row = torch.tensor([self.memory.frame(pad) for pad in self.pads or (0,)])
        at = of_row[:, None] + torch.arange(keys.shape[2])
        seen = torch.arange(keys.shape[2], device=device) <= self.row_index(queries)
        return Part(queries.placed, self.rotation(keys, at), values, seen if far is None else seen & ~far)

    def sinks_far(self, queries: Queries, distances: Sequence[int], far: Tensor | None) -> Part:
        """Show sink s at distance ``distances[s]`` from every query, where `far` holds (None: everywhere)."""
        keys, values = self.sinks()
        reach = max(distances)
        visible = None
        if far is not None:
            visible = far & (torch.arange(keys.shape[2], device=keys.device) <= self.row_index(queries))
        return Part(queries.at(reach), self._sinks_at(reach, distances), values, visible)

    def turned_window(self, queries: Queries, distances: Sequence[int], far: Tensor | None) -> Part:
        """Show one query the slots of a window that has turned for the longest row, in place: one part.

        Rows that are not that far see their own tokens alone.

        Parameters
        ----------
        queries : Queries
            A single query per row.
        distances : sequence of int
            The distance of sink s where it is far.
        far : Tensor or None
            Boolean, shape (batch or 1, 1, 1, G): where it is; None: nowhere.
        """
        memory = self.memory
        assert memory.keys is not None and memory.values is not None and memory.window is not None
        key = "turned", memory.sinks, memory.window, id(self.rotation.frequencies), queries.raw.device
        if key not in self.call.memo:
            visible, positions = self._turned(queries, distances, far)
            self.call.memo[key] = visible, self.rotation.angles(positions, queries.raw)
        visible, angles = self.call.memo[key]
        if memory.sinks:
            keys, values = self.sinks()
            memory.keys[:, :, : memory.sinks] = self.rotation.turned(keys, angles)
            memory.values[:, :, : memory.sinks] = values
        return Part(queries.placed, memory.keys, memory.values, visible)

    def _turned(
        self, queries: Queries, distances: Sequence[int], far: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Which row sees which slot, (batch or 1, 1, 1, W), None: all; where its sinks stand, (…, G)."""
        memory, device = self.memory, queries.raw.device
        assert memory.local is not None and memory.window is not None
        row_index = self.row_index(queries)
        sink, slot = (torch.arange(n, device=device) for n in (memory.sinks, memory.local))
        oldest = memory.slot(self.stop) - memory.sinks
        index = self.stop - memory.local + (slot - oldest) % memory.local - self.pad_column(device)
        visible = torch.cat((sink <= row_index, index >= memory.sinks), -1)
        distance = row_index - sink
        if far is not None:
            distance = torch.where(far, torch.tensor(distances, device=device), distance)
        positions = memory.frame(queries.first) - distance
        return None if bool(visible.all()) else visible, positions.flatten(0, 2)

    def all_slots(self, queries: Queries) -> Part:
        """Show one query everything in a window that is not full yet, at true distances: no copy."""
        memory, visible = self.memory, None
        assert memory.keys is not None and memory.values is not None
        if self.pads:
            device = queries.raw.device
            key = "slots", device
            if key not in self.call.memo:
                self.call.memo[key] = torch.arange(self.stop, device=device) >= self.pad_column(device)
            visible = self.call.memo[key]
        return Part(queries.placed, memory.keys[:, :, : self.stop], memory.values[:, :, : self.stop], visible)

    def sinks(self) -> tuple[Tensor, Tensor]:
        """Raw keys and values of the sinks."""
        held = self.memory.sink_keys, self.memory.sink_values
        assert held[0] is not None and held[1] is not None
        if self.new is None or not self.wants_gradient:
            return held[0], held[1]
        # Sinks among the new tokens once more, with their gradient: the memory holds them without.
        index = torch.arange(held[0].shape[2], device=held[0].device) + self.pad_column(held[0].device)
        index = index.transpose(2, 3) - self.memory.seen
        is_new, index = index >= 0, index.clamp(0, self.new[2].shape[2] - 1)
        keys, values = (
            torch.where(is_new, new.gather(2, index.expand(*old.shape)), old)
            for new, old in ((self.new[2], held[0]), (self.new[1], held[1]))
        )
        return keys, values

    def _sinks_at(self, query_position: int, distances: Sequence[int]) -> Tensor:
        """Rotate the sinks so that a query at `query_position` finds sink s at ``distances[s]``."""
        keys = self.sinks()[0]
        positions = [query_position - distance for distance in distances]
        if len(set(positions)) == 1:
            return self.rotation(keys, positions[0])
        run = range(positions[0], positions[0] + len(positions))
        return self.rotation(keys, run if positions == list(run) else torch.tensor(positions))


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


@functools.lru_cache(maxsize=64)
def _banded(ahead: int, n: int, m: int, nearest: int, farthest: int | None, device: torch.device) -> Tensor:
    """Which of n queries sees which of m keys, the first query `ahead` tokens after the first key."""
    with torch.inference_mode(False):  # remembered, and used with gradients too
        distance = (torch.arange(n, device=device) + ahead)[:, None] - torch.arange(m, device=device)
        visible = distance >= nearest
        if farthest is not None:
            visible &= distance <= farthest
        return visible[None, None]
