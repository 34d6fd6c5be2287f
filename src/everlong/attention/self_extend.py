"""SelfExtend: far tokens at positions that several of them share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part, Partial
from everlong.attention.placing import placed_keys, placed_queries, row_indices
from everlong.attention.policy import POLICIES, require_count
from everlong.attention.positions import Rotation
from everlong.attention.view import LayerCall, LayerView, Queries
from everlong.attention.window import WindowPolicy
from everlong.kernels.blocks import Triangle

_NEIGHBOURS = 1024
_FAR = ("far_keys", "far_values")


@POLICIES.register("self-extend")
@dataclass(frozen=True)
class SelfExtend(WindowPolicy):
    """LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning (Jin et al., ICML 2024).

    arXiv 2401.01325.

    What is kept: every key. What a query sees: every key before it. At which positions: neighbours, less than
    W tokens before the query, at their true distance; key k beyond at ``k // g``, seen by query q from
    ``q // g + W - W // g``. What is forgotten: nothing, so memory grows with the stream.

    Up to W tokens it is full attention. A model trained on L tokens finds distances it knows in inputs of up
    to about ``g * (L - W) + W``; longer ones are read, too, but not well.

    Parameters
    ----------
    neighbours : int, optional
        W. 1,024 by default, as in the paper, or half the training length where that is less.
    group_size : int
        g, tokens that share a position.
    """

    forgets: ClassVar[bool] = False
    takes_branches: ClassVar[bool] = True

    neighbours: int | None = None
    group_size: int = 8

    def __post_init__(self) -> None:
        require_count("SelfExtend", "neighbours", self.neighbours, least=1, optional=True)
        require_count("SelfExtend", "group_size", self.group_size, least=1)

    def resolve(self, training_length: int | None) -> Self:
        """Fill in how many tokens are neighbours."""
        if self.neighbours is not None:
            return self
        half = _NEIGHBOURS if training_length is None else max(1, training_length // 2)
        return replace(self, neighbours=min(_NEIGHBOURS, half))

    def shape(self) -> tuple[int, int | None]:
        """No sinks; neighbours are local."""
        assert self.neighbours is not None, "resolve() comes first"
        return 0, self.neighbours

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory of neighbours, and of what lies beyond."""
        assert self.neighbours is not None
        return GroupedMemory(self.neighbours, self.group_size, start)

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Show the neighbours, and all tokens beyond."""
        return [*super().parts(queries, view), *self._far_parts(queries, view)]

    def _far_parts(self, queries: Queries, view: LayerView) -> list[Part]:
        memory = view.memory
        assert isinstance(memory, GroupedMemory) and self.neighbours is not None
        neighbours = self.neighbours
        stop = queries.stop - neighbours  # the last query finds tokens before this one far
        if stop <= min(view.pads or (0,)):
            return []
        ahead = neighbours - neighbours // self.group_size
        placed = placed_queries(queries, view, lambda index: index // self.group_size + ahead)
        parts, grouped = [], min(memory.far, stop)  # what was grouped earlier is far from all queries
        if grouped:
            assert memory.far_keys is not None and memory.far_values is not None
            keys, values = memory.far_keys[:, :, :grouped], memory.far_values[:, :, :grouped]
            if torch.is_grad_enabled():  # what a gradient flows through must not be written to
                keys, values = keys.clone(), values.clone()
            parts.append(Part(placed, keys, values, _real(grouped, view, placed.device)))
        if stop > grouped:
            keys = memory.grouped(view.raw(grouped, stop), grouped, view.call)
            values = view.values(grouped, stop)
            parts += self._leaving(queries, view, Part(placed, keys, values), grouped)
        return parts

    def _leaving(self, queries: Queries, view: LayerView, part: Part, begin: int) -> list[Part]:
        """Show each query those of the tokens from `begin` on that are no neighbours of it."""
        assert self.neighbours is not None
        keys, values, device = part.keys, part.values, part.keys.device
        if view.pads or view.branches is not None:
            index = torch.arange(begin, begin + keys.shape[2], device=device) - view.pad_column(device)
            far = (view.row_index(queries) - index >= self.neighbours) & (index >= 0)
            return [replace(part, visible=far)]
        before = queries.first - self.neighbours - begin  # of these the first query sees all, and one more
        parts = [Part(part.queries, keys[:, :, before:], values[:, :, before:], Triangle.LOWER)]
        if before:
            parts.append(Part(part.queries, keys[:, :, :before], values[:, :, :before]))
        return parts


class GroupedMemory(LayerMemory):
    """A ring of neighbours, and all tokens that left it, rotated once to the positions they share.

    Parameters
    ----------
    neighbours : int
        W, tokens in the ring.
    group_size : int
        g, tokens that share a position.
    start : int
        Stream position of the first token.
    """

    def __init__(self, neighbours: int, group_size: int, start: int) -> None:
        super().__init__(0, neighbours, keep_raw=True, start=start)
        self.group_size = group_size
        self.far = 0
        """Tokens that left the ring."""
        self.far_keys: Tensor | None = None
        self.far_values: Tensor | None = None

    @property
    def kept(self) -> int:
        """All tokens."""
        return self.seen

    def takes_branches(self, height: int) -> bool:
        """Whether all tokens of branches so high are neighbours."""
        return self.local is not None and self.local > height

    def grouped(self, raw_keys: Tensor, begin: int, call: LayerCall) -> Tensor:
        """Rotate raw keys of the tokens from `begin` on to the positions they share."""
        return placed_keys(raw_keys, begin, call, lambda index: index // self.group_size)

    def append(
        self, raw_keys: Tensor, values: Tensor, call: LayerCall, *, provisional: bool = False
    ) -> LayerView:
        """Take in tokens, as of :class:`LayerMemory`; a single one pushes another out of the ring at once."""
        assert self.local is not None
        n = raw_keys.shape[2]
        self.follow(call.rotation, n)
        if call.pads and any(call.pads):
            self.index["pads"] = torch.tensor(call.pads)
        is_alone = n == 1 and not provisional and self.pending is None and call.branches is None
        if is_alone and not torch.is_grad_enabled() and self.seen >= self.local:
            assert self.raw is not None and self.values is not None
            at = self.slot(self.seen)
            self._put_away(self.raw[:, :, at : at + 1], self.values[:, :, at : at + 1], call)
        return super().append(raw_keys, values, call, provisional=provisional)

    def settle(self, view: LayerView) -> None:
        """Copy the tokens of a forward into the ring, and what leaves it behind the others that did."""
        assert self.local is not None
        stop = view.stop - self.local
        if view.new is not None and self.pending is None and stop > self.far:
            self._put_away(view.raw(self.far, stop), view.values(self.far, stop), view.call)
        super().settle(view)

    def follow(self, rotation: Rotation, n: int) -> None:
        """Bring all stored keys to this forward's table."""
        old, new = self.frequencies, rotation.frequencies
        if self.far_keys is not None and old is not None and new is not None and not new.same_as(old):
            pads = self.index.get("pads")
            at = row_indices(0, self.far, None if pads is None else tuple(pads.tolist())) // self.group_size
            held = self.far_keys[:, :, : self.far]
            held.copy_(rotation(Rotation(old, self.layout).undo(held, at), at))
        super().follow(rotation, n)

    def _put_away(self, raw_keys: Tensor, values: Tensor, call: LayerCall) -> None:
        keys = self.grouped(raw_keys, self.far, call)
        stop = self.far + keys.shape[2]
        self._make_room(stop, keys, values)
        assert self.far_keys is not None and self.far_values is not None
        self.far_keys[:, :, self.far : stop] = keys.detach()
        self.far_values[:, :, self.far : stop] = values.detach()
        self.far = stop

    def _make_room(self, length: int, keys: Tensor, values: Tensor) -> None:
        """Let the buffers of what left the ring grow until they hold `length` tokens."""
        have = 0 if self.far_keys is None else self.far_keys.shape[2]
        if have >= length:
            return
        for name, like in zip(_FAR, (keys, values), strict=True):
            old = getattr(self, name)
            with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
                grown = like.new_empty((*like.shape[:2], max(length, self.grown(have)), like.shape[3]))
            if old is not None:
                grown[:, :, : self.far] = old[:, :, : self.far]
            setattr(self, name, grown)

    def pick_rows(self, rows: Tensor) -> None:
        """Keep the given rows of the batch, in that order (repeats allowed)."""
        super().pick_rows(rows)
        for name in _FAR:
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held[rows.to(held.device)])

    def nbytes(self) -> dict[str, int]:
        """Bytes held, as of :class:`LayerMemory`."""
        held = super().nbytes()
        beyond = sum(x.nbytes for x in (self.far_keys, self.far_values) if x is not None)
        return held | {"window": held["window"] + beyond}

    def nbytes_at(self, tokens: int) -> dict[str, int]:
        """Bytes it will hold when `tokens` were seen, spare room aside."""
        assert self.keys is not None and self.values is not None and self.local is not None
        held = super().nbytes_at(tokens)
        a_token = sum(buffer.nbytes // buffer.shape[2] for buffer in (self.keys, self.values))
        return held | {"window": held["window"] + max(0, tokens - self.local) * a_token}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers from which :meth:`load` continues bit by bit."""
        tensors, numbers = super().state()
        if self.far_keys is not None and self.far_values is not None:
            for name, held in zip(_FAR, (self.far_keys, self.far_values), strict=True):
                tensors[name] = held[:, :, : self.far].clone()
        return tensors, numbers

    def load(self, tensors: dict[str, Tensor], numbers: dict[str, Any], rotation: Rotation) -> None:
        """Take over what :meth:`state` returned."""
        super().load(tensors, numbers, rotation)
        for name in _FAR:
            setattr(self, name, tensors[name].clone() if name in tensors else None)
        self.far = 0 if self.far_keys is None else self.far_keys.shape[2]


def _real(tokens: int, view: LayerView, device: torch.device) -> Tensor | None:
    """Return which of so many first tokens are no padding, (batch, 1, 1, n); None: all."""
    if not view.pads:
        return None
    key = "no padding", tokens, device
    if key not in view.call.memo:
        view.call.memo[key] = torch.arange(tokens, device=device) >= view.pad_column(device)
    real: Tensor = view.call.memo[key]
    return real
