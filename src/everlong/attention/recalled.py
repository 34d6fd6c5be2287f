"""The common ground of policies that bring back, from the tier below, some of what left the window.

A query sees some first tokens, what is recalled for it and its group, and the latest tokens. A subclass says
which tokens are recalled; where they stand is one of two ways, below.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor

from everlong.attention.block_maxima import BlockMaxima
from everlong.attention.key_index import keys_of_two
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Part, Partial
from everlong.attention.policy import Policy, require_count
from everlong.attention.ready import Choice, Span
from everlong.attention.ready_pool import ReadyPool
from everlong.attention.view import LayerView, Queries
from everlong.errors import ConfigurationError

_FIRST_CAPACITY = 64  # notes


@dataclass(frozen=True)
class Asking:
    """One row of a group of queries, as it asks what to recall.

    Attributes
    ----------
    number : int
        The row's.
    queries : slice
        Which of the group's queries ask: those whose window is full.
    begin, stop : int
        The tokens it may recall: those that are still kept, and that none of these queries sees otherwise.
        They are counted in the row, as all spans are.
    """

    number: int
    queries: slice
    begin: int
    stop: int


@dataclass(frozen=True)
class RecallPolicy(Policy):
    """G sinks, at most R recalled tokens, and the latest L: W together. Subclasses choose what is recalled.

    Up to W tokens a query sees all of them, at their true distances. From then on it sees its own latest L,
    and tokens that its group recalled from what had left that before the group's first query. So tokens that
    leave within a group are not seen until the next; nor, where written tokens see what one before them asked
    for, those that leave until the next asks.

    Subclasses are dataclasses with the fields ``sinks``, ``window``, ``recalled`` and ``group``.
    """

    forgets: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True
    are_in_cache: ClassVar[bool] = False
    """Whether sinks, recalled and latest tokens stand one behind the other; otherwise sinks and recalled
    tokens all stand at one place, L - 1 before the query."""

    def __post_init__(self) -> None:
        name = type(self).__name__
        require_count(name, "sinks", self._field("sinks"), least=0)
        require_count(name, "group", self._field("group"), least=1)
        for field in ("window", "recalled"):
            require_count(name, field, self._field(field), least=1, optional=True)

    def unit(self) -> int:
        """Tokens that are recalled together, at least."""
        return 1

    def default_recalled(self, room: int) -> int:
        """Return R, of `room` tokens for recalled and latest ones."""
        return room // 2

    def resolve(self, training_length: int | None) -> Self:
        """Fill in the window, and from it the number of recalled tokens."""
        resolved = super().resolve(training_length)
        window, sinks = resolved._window, resolved._field("sinks")
        recalled = resolved._field("recalled")
        if recalled is None:
            recalled = max(0, self.default_recalled(window - sinks)) // self.unit() * self.unit()
        if recalled < self.unit() or window - sinks - recalled <= self.least_local():
            raise ConfigurationError(
                f"{type(self).__name__}: a window of {window} cannot hold {sinks} sinks, {recalled} recalled "
                f"tokens (at least {self.unit()}) and more than {self.least_local()} latest ones; use a "
                "larger window, fewer sinks, or another number of recalled tokens"
            )
        if recalled % self.unit():
            low = recalled // self.unit() * self.unit()
            raise ConfigurationError(
                f"{type(self).__name__}: recalled={recalled} must be a multiple of the {self.unit()} tokens "
                f"that are recalled together: use {low} or {low + self.unit()}"
            )
        return replace(resolved, **{"recalled": recalled})

    def least_local(self) -> int:
        """Return of how many latest tokens there must be more."""
        return 0

    def _field(self, name: str) -> int:
        value: int = getattr(self, name)
        return value

    @property
    def _window(self) -> int:
        return self._field("window")

    def shape(self) -> tuple[int, int, int]:
        """Return G, R and L."""
        sinks, recalled = self._field("sinks"), self._field("recalled")
        return sinks, recalled, self._window - sinks - recalled

    def far_distance(self) -> int:
        """Return how far before a query the nearest of its sinks and recalled tokens stands."""
        return self.shape()[2] - 1

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory for `layer`: a window with a tier below."""
        sinks = self._field("sinks")
        return LayerMemory(sinks, self._window - sinks, keep_middle=True, start=start)

    def nbytes_beside(self, layer: int, tokens: int, memory: LayerMemory) -> dict[str, int]:
        """Return the bytes of what is ready to be shown; what is noted of the tokens is not counted."""
        keys, values = memory.keys, memory.values
        if tokens <= self._window or memory.tier is None or keys is None or values is None:
            return {}
        sinks, recalled, _ = self.shape()
        one, other = (x[:, :, :1].nbytes for x in (keys, values))
        left = recalled * (one + other)  # lately wanted, as many again
        return {"window": recalled * one + (sinks + recalled) * (one + other) + left}

    def breaks(self) -> tuple[int, ...]:
        """End groups where the window fills."""
        return (self._window,)

    def plain_until(self) -> int | None:
        """Return W: before, queries see all there is."""
        return self._window

    takes_branches: ClassVar[bool] = True

    def in_place(self, row_index: int, index: int) -> Sequence[int] | None:
        """All slots, before anything has left the window; not where each token is taken note of."""
        return () if index < self._window and type(self).observe is Policy.observe else None

    def lookup_group(self) -> int | None:
        """Return how many queries ask together what to recall."""
        return self._field("group")

    def pinned(self, sinks: int) -> Self:
        """Keep more first tokens; what is left is shared by recalled and latest ones as before."""
        room, left = self._window - self._field("sinks"), self._window - sinks
        recalled = max(self._field("recalled") * left // room // self.unit(), 1) * self.unit()
        return replace(self, **{"sinks": sinks, "recalled": recalled})

    @abstractmethod
    def choose(self, asking: Asking, queries: Queries, view: LayerView) -> Choice:
        """Return which of the tokens from `asking.begin` to `asking.stop` are recalled, at most R.

        A single list is for all heads; otherwise each key-value head has one, all of as many tokens. The
        spans of a list do not overlap, and stand in order.
        """

    def parts(self, queries: Queries, view: LayerView) -> list[Part | Partial]:
        """Show sinks, what is recalled, and the latest tokens."""
        if queries.stop <= self._window:
            return [view.all_slots(queries)] if view.new is None else [*view.band(queries)]
        pads = view.pads or (0,) * len(queries.raw)
        is_mixed = queries.first - max(pads) < self._window
        is_full = view.row_index(queries) >= self._window if is_mixed else None
        chosen = [self._chosen(queries, view, row, pad) for row, pad in enumerate(pads)]
        return [
            *self._near_sinks(queries, view, is_full),
            *self._far_part(queries, view, chosen, is_full),
            *self._local_parts(queries, view, is_full),
        ]

    def _chosen(self, queries: Queries, view: LayerView, row: int, pad: int) -> Choice:
        sinks, _, local = self.shape()
        tier = view.memory.tier
        assert tier is not None
        first = max(queries.first - pad, self._window)
        begin, stop = max(sinks, sinks + tier.first - pad), first - local + 1
        if first >= queries.stop - pad or begin >= stop:
            return [[]]
        asking = Asking(row, slice(first + pad - queries.first, None), begin, stop)
        return self.choose(asking, queries, view)

    def far_queries(self, queries: Queries) -> Tensor:
        """Return the queries where the tokens before their latest L stand at or before 0."""
        return queries.at(self.far_distance())

    def _near_sinks(self, queries: Queries, view: LayerView, is_full: Tensor | None) -> list[Part]:
        sinks = self._field("sinks")
        if not sinks or is_full is None:
            return []
        return [view.sinks_near(queries, is_full.expand(*is_full.shape[:3], sinks))]

    def _far_part(
        self, queries: Queries, view: LayerView, chosen: Sequence[Choice], is_full: Tensor | None
    ) -> list[Part]:
        """Show the sinks and what is recalled, each row its own, to queries whose window is full."""
        counts = [sum(stop - begin for begin, stop in choice[0]) for choice in chosen]
        sinks, most = self._field("sinks"), max(counts)
        if not sinks + most:
            return []
        places = self._places(counts, sinks, most)
        keys, values = view.memory.ready.placed(chosen, view, places, is_final=is_full is None)
        visible = None if is_full is None else is_full.expand(*is_full.shape[:3], sinks + most)
        if len(set(counts)) > 1:
            is_there = torch.arange(sinks + most) < sinks + torch.tensor(counts)[:, None]
            is_there = is_there[:, None, None].to(keys.device)
            visible = is_there if visible is None else is_there & visible
        return [Part(self.far_queries(queries), keys, values, visible)]

    def _places(self, counts: Sequence[int], sinks: int, most: int) -> Tensor | int:
        """Where sinks stand, and behind them up to `most` recalled tokens, of each row so many."""
        if not self.are_in_cache:
            return 0
        places = torch.arange(sinks + most) - sinks - torch.tensor(counts)[:, None]
        return places[:1] if len(set(counts)) == 1 else places

    def _local_parts(self, queries: Queries, view: LayerView, is_full: Tensor | None) -> list[Part]:
        sinks, recalled, local = self.shape()
        if is_full is None:
            return view.band(queries, farthest=local - 1, lowest=sinks)
        begin, device = view.first, queries.raw.device
        index = torch.arange(begin, queries.stop, device=device) - view.pad_column(device)
        away = view.row_index(queries) - index
        seen = (index >= sinks) & (away >= 0) & (away < torch.where(is_full, local, local + recalled))
        return [Part(queries.placed, view.keys(begin, queries.stop), view.values(begin, queries.stop), seen)]


@dataclass(frozen=True)
class BlockRecallPolicy(RecallPolicy):
    """Recalls blocks: from the first token after the sinks on, each of so many tokens. Subclasses judge them.

    Subclasses have a field ``block``, too.
    """

    may_leave_block: ClassVar[bool] = False
    """Whether it may be None, for :meth:`resolve` to fill in."""
    heads_agree: ClassVar[bool] = True
    """Whether all heads of a row recall the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        name, block = type(self).__name__, self._field("block")
        require_count(name, "block", block, least=1, optional=self.may_leave_block)

    def unit(self) -> int:
        """Return the tokens of a block."""
        return self._field("block")

    def default_recalled(self, room: int) -> int:
        """Return a third of the room."""
        return room // 3

    def memory(self, layer: int, start: int) -> LayerMemory:
        """Return an empty memory for `layer`, which has a pool of blocks ready where heads agree."""
        memory = super().memory(layer, start)
        if self.heads_agree and not self.are_in_cache:
            memory.ready = ReadyPool(self.unit(), self.shape()[1] // self.unit())
        return memory

    def nbytes_beside(self, layer: int, tokens: int, memory: LayerMemory) -> dict[str, int]:
        """Return the bytes of what is ready to be shown; what is noted of the tokens is not counted."""
        found = super().nbytes_beside(layer, tokens, memory)
        if found and memory.values is not None and isinstance(memory.ready, ReadyPool):
            found["window"] += self.shape()[1] * memory.values[:, :, :1].nbytes  # in the pool, too
        return found

    def block_span(self, number: int) -> Span:
        """Return the tokens of a block."""
        begin = self._field("sinks") + number * self.unit()
        return begin, begin + self.unit()

    @abstractmethod
    def worth(self, blocks: range, asking: Asking, queries: Queries, view: LayerView) -> Tensor:
        """Return what each block is worth to the queries that ask, shape (blocks,).

        Or (key-value heads, blocks): then each head recalls its own, and :attr:`heads_agree` is False.
        """

    def choose(self, asking: Asking, queries: Queries, view: LayerView) -> Choice:
        """Return the blocks that are worth most; of blocks worth the same, the earlier."""
        sinks, recalled, _ = self.shape()
        first, stop = -(-(asking.begin - sinks) // self.unit()), (asking.stop - sinks) // self.unit()
        blocks, most = range(first, max(first, stop)), recalled // self.unit()
        if len(blocks) <= most:
            return [[self.block_span(number) for number in blocks]]
        worth = self.worth(blocks, asking, queries, view)
        best = (
            worth.reshape(-1, len(blocks)).sort(descending=True, stable=True).indices[:, :most].sort().values
        )
        begin, unit = self.block_span(first)[0], self.unit()
        return [
            [(at, at + unit) for at in (begin + number * unit for number in some)] for some in best.tolist()
        ]


def by_key_head(queries: Tensor, heads: int) -> Tensor:
    """Add up queries (query heads, d) that share one of the key-value heads."""
    return queries.reshape(heads, -1, queries.shape[-1]).sum(1)


def held_keys(view: LayerView) -> Tensor:
    """Return keys that are at hand, for their shape, type and device: (batch, key-value heads, n, d)."""
    keys = view.memory.keys if view.new is None else view.new[0]
    assert keys is not None
    return keys


def best_products(asked: Tensor, row: int, begin: int, stop: int, block: int, view: LayerView) -> Tensor:
    """Return for each block of raw keys the largest product of each of `asked` with one of them.

    Parameters
    ----------
    asked : Tensor
        Of each key-value head its own, shape (key-value heads, c, d), in the type to add up in.
    row : int
        Whose keys.
    begin, stop : int
        Of which tokens, counted in the row, in blocks; some or all may have left the window.
    block : int
        Tokens of a block.
    view : LayerView
        Where they are.

    Returns
    -------
    Tensor
        Shape (key-value heads, c, blocks).
    """
    pad, tier, sinks = view.pads[row] if view.pads else 0, view.memory.tier, view.memory.sinks
    assert tier is not None
    best = BlockMaxima(asked, begin + pad - sinks, stop + pad - sinks, block)
    count = len(tier)
    if best.begin < count:
        tier.look(row, best)
    if best.stop > count:
        first = max(best.begin, count)
        best.look(first, view.raw(first + sinks, stop + pad)[row].detach())
    return best.found


def keys_at(tokens: Tensor, row: int, view: LayerView) -> Tensor:
    """Return the raw keys of a row's `tokens`, each head its own, where they are at hand.

    Parameters
    ----------
    tokens : Tensor
        Shape (key-value heads, n), on the CPU, counted in the row; some or all may have left the window.
    row : int
        Whose keys.
    view : LayerView
        Where they are.

    Returns
    -------
    Tensor
        Shape (key-value heads, n, d).
    """
    pad, tier, sinks = view.pads[row] if view.pads else 0, view.memory.tier, view.memory.sinks
    assert tier is not None
    count = len(tier)

    def late() -> Tensor:
        return view.raw(sinks + count, view.stop)[row].detach()

    return keys_of_two(tokens + (pad - sinks), count, partial(tier.keys_at, row), late)


def reserve_notes(index: dict[str, Tensor], name: str, count: int) -> None:
    """Make room for `count` notes of each row: it doubles."""
    notes = index[name]
    if notes.shape[1] < count:
        with torch.inference_mode(False):  # later forwards, in whatever mode, write into it
            room = max(count, 2 * notes.shape[1], _FIRST_CAPACITY) - notes.shape[1]
            index[name] = torch.cat((notes, notes.new_zeros(len(notes), room, *notes.shape[2:])), 1)
