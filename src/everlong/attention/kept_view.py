"""What one forward finds in the slots of a memory that chooses what to keep, group of queries by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from everlong.attention.view import LayerCall, LayerView, Queries
from everlong.errors import UnsupportedUseError

if TYPE_CHECKING:
    from everlong.attention.kept import KeptMemory

AT, SCORE = "at", "score"
"""Notes of a memory's index, (batch, key-value heads, slots): a token's index, and what it is worth."""


@dataclass(eq=False)
class Stage:
    """What one group of queries finds in the slots: those before it that stayed, then its own tokens.

    Attributes
    ----------
    first, stop : int
        Index of the group's first query, and the one after its last's.
    count : int
        m, slots of each row and head.
    slots : Tensor or None
        Which they are of those held and new, (batch, key-value heads, m); None: the first m.
    keys, values : Tensor
        Shape (batch, key-value heads, m, d), as stored.
    is_put : bool
        Whether the group is one token that lies in the memory already.
    replaced : bool
        Whether it took the slot of another.
    """

    first: int
    stop: int
    count: int
    slots: Tensor | None
    keys: Tensor
    values: Tensor
    is_put: bool = False
    replaced: bool = False


Worth = Callable[[Tensor], Tensor]
"""Tells what the tokens in slots of those held and new are worth, float32, both (batch, heads, m)."""


class KeptView(LayerView):
    """The kept and the new tokens of one layer during one forward, group after group."""

    def __init__(
        self, memory: KeptMemory, call: LayerCall, stop: int, new: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        super().__init__(memory, call, stop, new)
        self.kept, self.fresh = memory, new
        self._own_call = call
        self.has_dead = memory.has_dead
        self.latest: Stage | None = None
        self._stages: dict[int, Stage] = {}
        self._joined: tuple[Tensor, Tensor] | None = None
        n = stop - memory.seen
        fresh = torch.arange(memory.seen, stop, device=memory.device).expand(*new[0].shape[:2], n)
        self.at = torch.cat((memory.index[AT], fresh), 2)
        self.score = torch.cat((memory.index[SCORE], torch.zeros_like(fresh, dtype=torch.float)), 2)

    @property
    def is_own(self) -> bool:
        """Whether these are the layer's own keys, whose queries choose, and not those of another."""
        return self.call is self._own_call

    def stage(self, queries: Queries, room: int | None, least: int, worth: Worth) -> Stage:
        """Return what a group finds, making room for it first where there is too little.

        Parameters
        ----------
        queries : Queries
            The group.
        room : int or None
            Slots that it may find at most, its own included.
        least : int
            Tokens of a row that are left before its own, if there must be room made for it.
        worth : callable
            What tells which these are: the tokens worth most, of those worth the same the earlier.
        """
        if queries.first in self._stages:
            return self._stages[queries.first]  # another layer made it, which shares its keys
        memory, n = self.kept, queries.stop - queries.first
        if not self.is_own or queries.first != (memory.seen if self.latest is None else self.latest.stop):
            raise UnsupportedUseError(
                "this model computes the last query alone: no policy can choose what to keep by all of them"
            )
        before = queries.first - memory.seen + memory.held
        if self.latest is not None and self.latest.slots is not None:
            before = self.latest.count
        is_full = room is not None and before + n > room
        if self._may_put(n, queries):
            stage = self._put(queries, least if is_full else None, worth)
        elif not is_full and (self.latest is None or self.latest.slots is None):
            keys, values = self._all()
            m = before + n
            stage = Stage(queries.first, queries.stop, m, None, keys[:, :, :m], values[:, :, :m])
        else:
            slots = self._before(before)
            if is_full:
                assert room is not None
                slots = self._chosen(slots, worth(slots), room - n, least)
            own = torch.arange(queries.first, queries.stop, device=slots.device) - memory.seen + memory.held
            slots = torch.cat((slots, own.expand(*slots.shape[:2], n)), 2)
            keys, values = self._all()
            with _lasting():
                stage = Stage(
                    *(queries.first, queries.stop, slots.shape[2], slots),
                    *(picked(keys, slots), picked(values, slots)),
                )
        self._stages[queries.first] = self.latest = stage
        return stage

    def _chosen(self, slots: Tensor, worth: Tensor, most: int, least: int) -> Tensor:
        """Return the slots of `least` tokens a row, or of all that a row has, where these are at most `most`.

        Where rows differ in that, those that keep fewer have dead slots.
        """
        at, keeps = self.at.gather(2, slots), [least] * len(slots)
        if self.pads is not None or self.has_dead:
            real = (at[:, 0] >= self.pad_column(at.device)[:, 0, 0]).sum(-1).tolist()
            keeps = [least if count > most else count for count in real]
        places, is_dead = best(worth, at, keeps)
        slots = slots.gather(2, places)
        if is_dead is not None:
            self.has_dead = True
            self.at.scatter_(2, slots, self.at.gather(2, slots).masked_fill(is_dead, -1))
        return slots

    def at_of(self, stage: Stage) -> Tensor:
        """Return the indices of a stage's tokens, (batch, key-value heads, m)."""
        return self.at[..., : stage.count] if stage.slots is None else self.at.gather(2, stage.slots)

    def keys_in(self, slots: Tensor) -> Tensor:
        """Return keys as stored of the tokens in these slots of those held and new."""
        return picked(self._all()[0], slots)

    def add_score(self, stage: Stage, more: Tensor) -> None:
        """Add to the scores of a stage's tokens, (batch, key-value heads, m)."""
        if stage.slots is None:
            self.score[..., : stage.count] += more
        else:
            self.score.scatter_add_(2, stage.slots, more)

    def _may_put(self, n: int, queries: Queries) -> bool:
        """Whether the memory may take the forward's only token in before its query attends: no copies."""
        is_single = n == 1 and self.stop == self.kept.seen + 1
        return is_single and not torch.is_grad_enabled() and not self.kept.in_cache

    def _put(self, queries: Queries, least: int | None, worth: Worth) -> Stage:
        memory, slots = self.kept, None
        if least is not None:
            assert least == memory.held - 1, "one token takes the place of one"
            slots = least_of(worth(self._before(memory.held)), memory.index[AT])
        memory.take_one(*self.fresh[:2], slots)
        self.at, self.score = memory.index[AT], memory.index[SCORE]
        m = self.at.shape[2]
        assert memory.keys is not None and memory.values is not None
        keys, values = memory.keys[:, :, :m], memory.values[:, :, :m]
        return Stage(queries.first, queries.stop, m, None, keys, values, True, slots is not None)

    def _before(self, count: int) -> Tensor:
        """Return the slots that stand before a group, (batch, key-value heads, count)."""
        if self.latest is not None and self.latest.slots is not None:
            return self.latest.slots
        return torch.arange(count, device=self.at.device).expand(*self.at.shape[:2], count)

    def _all(self) -> tuple[Tensor, Tensor]:
        """Return keys and values of what is held and of what is new."""
        if self._joined is None:
            memory = self.kept
            held = [None if x is None else x[:, :, : memory.held] for x in (memory.keys, memory.values)]
            keys, values = (
                new if old is None or not memory.held else torch.cat((old, new), 2)
                for old, new in zip(held, self.fresh[:2], strict=True)
            )
            self._joined = keys, values
        return self._joined


def best(worth: Tensor, at: Tensor, keeps: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Return which tokens are worth most, in the order of the stream; of equals, the earlier.

    Parameters
    ----------
    worth, at : Tensor
        Of each token, and its index; shape (batch, heads, m).
    keeps : sequence of int
        How many, of each row.

    Returns
    -------
    Tensor
        Where they stand, (batch, heads, n), n of the row with most.
    Tensor or None
        Boolean, the same shape: which of these are none, but fill a row that has fewer; they stand first.
    """
    age = at.sort(dim=-1, stable=True).indices
    order = worth.gather(-1, age).sort(dim=-1, descending=True, stable=True).indices[..., : max(keeps)]
    if min(keeps) == max(keeps):
        return age.gather(-1, order.sort(dim=-1).values), None
    rank = torch.arange(max(keeps), device=at.device)
    is_dead = rank >= torch.tensor(keeps, device=at.device)[:, None, None]
    in_order = order.masked_fill(is_dead, -1).sort(dim=-1, stable=True).indices
    return age.gather(-1, order.gather(-1, in_order)), is_dead.expand_as(order).gather(-1, in_order)


def least_of(worth: Tensor, at: Tensor) -> Tensor:
    """Return which token is worth least, (..., 1); of equals, the latest."""
    lowest = worth == worth.amin(-1, keepdim=True)
    return at.masked_fill(~lowest, -2).argmax(-1, keepdim=True)


def picked(buffer: Tensor, slots: Tensor) -> Tensor:
    """Return the slots (batch, heads, m) of each row and head of a buffer (batch, heads, n, d)."""
    batch, heads, n, size = buffer.shape
    base = torch.arange(batch * heads, device=slots.device).view(batch, heads, 1) * n
    flat = buffer.reshape(-1, size).index_select(0, (slots + base).flatten())
    return flat.view(batch, heads, slots.shape[2], size)


def _lasting() -> ExitStack:
    """Leave inference mode, if this is it: later forwards, in whatever mode, use what is made within."""
    stack = ExitStack()
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
    return stack
