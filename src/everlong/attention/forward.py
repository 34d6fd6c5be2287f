"""One forward of an attached model: how each of its layers attends, and what its cache takes in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor

from everlong.attention.cache import KeptLayer, StreamCache
from everlong.attention.cache_interface import PolicyCache
from everlong.attention.parts import Logits, attend
from everlong.attention.policy import Policy
from everlong.attention.positions import Rotation
from everlong.attention.standing_step import StandingStep, standing_step
from everlong.attention.tiers import TierLostError
from everlong.attention.token_step import TokenStep, token_step
from everlong.attention.view import LayerCall, LayerView
from everlong.attention.window import LocalWindow
from everlong.errors import UnsupportedUseError
from everlong.models.anatomy import LayerAnatomy
from everlong.models.heap import give_holes_back
from everlong.models.rotary import Rotary

GROUP = 256
"""Queries that are attended together in prefill."""


class Underway(Protocol):
    """A forward under way, of whatever kind; members as of :class:`Forward`."""

    @property
    def owner(self) -> str:
        """The attachment it belongs to."""

    @property
    def cache(self) -> PolicyCache:
        """What it goes on from."""

    @property
    def outer(self) -> Underway | None:
        """The forward it was begun in."""

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Let layer `number` attend."""

    def finish(self) -> None:
        """Count the tokens."""


class Layers:
    """The attention layers of one model.

    Attributes
    ----------
    kept : dict of int to KeptLayer
        By number, the layers that have keys of their own.
    kinds : list of list of LayerAnatomy
        All layers, those together that attend alike.
    share_keys : bool
        Whether some use the keys of others.
    """

    def __init__(self, anatomy: Sequence[LayerAnatomy]) -> None:
        self._by_number = {layer.index: layer for layer in anatomy}
        self._local_policies = {
            w: LocalWindow(w) for w in {layer.window for layer in anatomy} if w is not None
        }
        self._donors = {layer.donor for layer in anatomy}
        self.kept = {
            layer.index: KeptLayer(layer.window, self._last_reader(layer))
            for layer in anatomy
            if layer.donor is None
        }
        self.share_keys = self._donors != {None}
        self.kinds: list[list[LayerAnatomy]] = []
        for layer in anatomy:
            alike = next((kind for kind in self.kinds if kind[0].is_like(layer)), None)
            if alike is None:
                self.kinds.append([layer])
            else:
                alike.append(layer)

    @property
    def full(self) -> tuple[int, ...]:
        """The numbers of those with full attention, which follow the policy."""
        return tuple(number for number, layer in self._by_number.items() if layer.window is None)

    def tables_change(self, policy: Policy) -> bool:
        """Whether some rotary table depends, under `policy`, on the length of the input."""
        tables = [self._rotary(layer, policy) for layer in self._by_number.values()]
        return any(table is not None and table.changes for table in tables)

    def __len__(self) -> int:
        return len(self._by_number)

    def __getitem__(self, number: int) -> LayerAnatomy:
        return self._by_number[number]

    def policy(self, layer: LayerAnatomy, policy: Policy) -> Policy:
        """Return what `layer` follows under `policy`: its own window, where it has one."""
        return policy if layer.window is None else self._local_policies[layer.window]

    def gives(self, layer: LayerAnatomy) -> bool:
        """Whether other layers use the keys of this one."""
        return layer.index in self._donors

    def rotation(self, layer: LayerAnatomy, policy: Policy, length: int, memo: dict[Any, Any]) -> Rotation:
        """Return the rotation of `layer` in an input of `length` tokens, the same for all of a forward."""
        frequencies, rotary = None, self._rotary(layer, policy)
        if rotary is not None:
            key = (rotary, length if layer.window is None else min(length, layer.window))
            if key not in memo:
                memo[key] = rotary.frequencies(key[1])
            frequencies = memo[key]
        return Rotation(frequencies, layer.layout, memo)

    def rotations(self, policy: Policy, length: int) -> dict[int, Rotation]:
        """Return the rotation of each layer with keys of its own in an input of `length` tokens."""
        return {number: self.rotation(self[number], policy, length, {}) for number in self.kept}

    def check(self, policy: Policy) -> None:
        """Raise unless all layers can rotate as `policy` says."""
        for layer in self._by_number.values():
            self._rotary(layer, policy)

    def _rotary(self, layer: LayerAnatomy, policy: Policy) -> Rotary | None:
        return None if layer.rotary is None else self.policy(layer, policy).rotary(layer.rotary)

    def _last_reader(self, layer: LayerAnatomy) -> int:
        readers = (other.index for other in self._by_number.values() if other.donor == layer.index)
        return max(readers, default=layer.index)


@dataclass
class _Manner:
    """How some layers attend in one forward; the shortest way, if there is one, once it was looked for."""

    policy: Policy
    rotation: Rotation
    step: TokenStep | StandingStep | None = None
    has_looked: bool = False


@dataclass
class Forward:
    """One forward under way.

    Attributes
    ----------
    owner : str
        The attachment it belongs to.
    layers : Layers
        The model's.
    cache : StreamCache
        What it goes on from.
    tokens : int
        New tokens per row.
    is_kept : bool
        Whether the cache takes them in.
    outer : Underway or None
        The forward it was begun in, of another model.
    """

    owner: str
    layers: Layers
    cache: StreamCache
    tokens: int
    is_kept: bool
    outer: Underway | None = None
    _attended: int = 0
    _given: dict[int, LayerView] = field(default_factory=dict)
    _memo: dict[Any, Any] = field(default_factory=dict)
    _manners: dict[Any, _Manner] = field(default_factory=dict)

    def attend(
        self, number: int, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Let layer `number` attend as its policy says.

        Parameters
        ----------
        number : int
            The layer's.
        query : Tensor
            Unrotated, shape (batch, heads, n, d); n may be less than the new tokens: then it is the last.
        key, value : Tensor
            Unrotated, of all new tokens, shape (batch, key-value heads, new tokens, d).
        **logits
            See :class:`~everlong.attention.parts.Logits`.

        Returns
        -------
        Tensor
            Shape (batch, heads, n, d).
        """
        layer, cache = self.layers[number], self.cache
        manner = self._manner(layer, query.device)
        if (
            self.tokens == 1
            and layer.donor is None
            and not self.layers.gives(layer)
            and not cache.is_provisional
        ):
            memory = cache.memories[number]
            step = self._step(layer, manner, query)
            if step is not None and step.fits(memory, number):
                self._attended += 1
                return step.attend(memory, query, key, value, **logits)
        policy, rotation = manner.policy, manner.rotation
        made_by = logits["scaling"], logits.get("softcap"), logits.get("sink_logits")
        call = LayerCall(number, rotation, cache.pads, *made_by, cache.branches, self._memo)
        if layer.donor is None:
            view = cache.memories[number].append(key, value, call, provisional=cache.is_provisional)
        else:
            view = self._given[layer.donor].of(call)
        first, placed = view.stop - query.shape[2], view.place(query)
        if cache.branches is not None:
            if query.shape[2] != len(cache.branches):
                raise UnsupportedUseError("this model computes the last query alone: it takes no branches")
            first = view.memory.seen
            groups = [(first, first + query.shape[2])]  # all at once
        else:
            groups = _groups(first, view.stop, policy, is_padded=view.pads is not None)
        outputs = []
        for begin, stop in groups:
            group = slice(begin - first, stop - first)
            queries = view.queries(query[:, :, group], placed[:, :, group], begin)
            try:
                parts = policy.parts(queries, view)
            except TierLostError:
                parts = policy.parts(queries, view)  # of what is left
            outputs.append(attend(parts, **logits))
            policy.observe(queries, view)
        if self.layers.gives(layer):
            self._given[number] = view  # settled at the end, when the layers that share it have seen it
        elif self.is_kept and layer.donor is None:
            view.memory.settle(view)
        self._attended += 1
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _manner(self, layer: LayerAnatomy, device: torch.device) -> _Manner:
        """Return how layers like this one attend on `device`, found once for all of them."""
        kind = layer.window, layer.rotary, layer.layout
        found = self._manners.get((*kind, device))
        if found is None:
            policy = self.layers.policy(layer, self.cache.policy)
            branches = self.cache.branches
            length = self.cache.seen + (self.tokens if branches is None else branches.height)
            if policy.span is not None:
                length = min(length, policy.span)
            rotation = self.layers.rotation(layer, policy, length, self._memo)
            found = self._manners[(*kind, device)] = _Manner(policy, rotation)
        return found

    def _step(self, layer: LayerAnatomy, manner: _Manner, like: Tensor) -> TokenStep | StandingStep | None:
        """Return the shortest way through layers like this one, if there is one."""
        if not manner.has_looked:
            manner.has_looked = True
            alike = []
            for number, memory in self.cache.memories.items():
                other = self.layers[number]
                is_here = memory.keys is None or memory.keys.device == like.device
                if is_here and other.is_like(layer) and not self.layers.gives(other):
                    memory.follow(manner.rotation, 1)
                    alike.append((number, memory))
            given = manner.rotation, like, self.cache.pads
            manner.step = token_step(manner.policy, [memory for _, memory in alike], *given)
            manner.step = manner.step or standing_step(manner.policy, alike, *given)
        return manner.step

    def finish(self) -> None:
        """Count the tokens, once all layers have attended."""
        if self._attended != len(self.layers):
            raise UnsupportedUseError(
                f"{self._attended} of {len(self.layers)} layers followed the policy: the attention "
                "implementation was changed while attached; call set_attn_implementation() before attach() "
                "or after detach()"
            )
        if self.is_kept:
            for view in self._given.values():
                view.memory.settle(view)
        self.cache.end(self.tokens)
        give_holes_back(self.tokens)


def _groups(first: int, stop: int, policy: Policy, *, is_padded: bool) -> list[tuple[int, int]]:
    """Cut queries [first, stop) into groups: where the policy changes its form, and at most `GROUP` long.

    Plain causal attention is not cut, except where padding needs a mask.
    """
    if stop - first == 1:
        return [(first, stop)]
    plain = 0 if is_padded else policy.plain_until()
    edges = [first, *sorted({at for at in policy.breaks() if first < at < stop}), stop]
    asked = policy.lookup_group()
    if asked is not None:
        return _lookup_groups(edges, asked, plain)
    size = GROUP if policy.span is None else max(1, min(GROUP, policy.span))
    groups: list[tuple[int, int]] = []
    for low, high in zip(edges, edges[1:], strict=False):
        step = high - low if plain is None or high <= plain else size
        groups += [(begin, min(begin + step, high)) for begin in range(low, high, step)]
    return groups


def _lookup_groups(edges: Sequence[int], size: int, plain: int | None) -> list[tuple[int, int]]:
    """Cut what lies between edges at multiples of `size` too, but not what is attended plainly."""
    groups: list[tuple[int, int]] = []
    for low, high in pairwise(edges):
        if plain is None or high <= plain:
            groups.append((low, high))
            continue
        ends = [*range((low // size + 1) * size, high, size), high]
        groups += pairwise([low, *ends])
    return groups
