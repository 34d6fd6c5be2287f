"""The shortest way through a layer: one token a row, in a window that needs neither mask nor merge.

Writing is this, token after token. A step knows what all layers with the same policy and rotation have in
common, and leaves each the least it can: rotate, put away, attend to the slots as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from everlong.attention.layer_memory import LayerMemory
from everlong.attention.parts import Logits, attend_all
from everlong.attention.policy import Policy
from everlong.attention.positions import Angles, Rotation
from everlong.errors import UnsupportedUseError
from everlong.kernels.calls import Scratch, attend, attends, fit, token_fits, turn_and_put, window_fits
from everlong.kernels.loading import in_use
from everlong.models.rotary import Positions


class Place(NamedTuple):
    """Where one token goes, and from where it sees; made by :func:`token_place`.

    Attributes
    ----------
    at : int
        The token's frame position.
    slot : int
        The slot it is put into.
    slots : int
        Slots that it sees, from the first on, its own included.
    sinks : int, range, Tensor or None
        Frame positions to which the sinks are rotated first; None: they stand right.
    """

    at: int
    slot: int
    slots: int
    sinks: Positions | None


@dataclass(frozen=True, eq=False)
class TokenStep:
    """One step of writing in the layers of one policy; made by :func:`token_step`, or of static tensors.

    Attributes
    ----------
    rotation : Rotation
        The layers'.
    seen, origin : int
        Where their memories stand: tokens before this one, and the frame's origin.
    slots : int
        Slots that are seen, from the first on, this token's included; where `grows`, all that there are.
    here : Angles
        What rotates this token's query and key.
    sinks : dict of int to Tensor
        The rotated sinks of each memory, by its id, where they keep their distance.
    pads : tuple of int or None
        The rows' padding.
    slot : Tensor, optional
        The slot to put the token into, shape (1,), in steps to be recorded; otherwise their memories say.
    count : Tensor, optional
        How many slots are seen, shape (1,), beside `slot`.
    grows : bool
        Whether that becomes more from step to step, which compiled kernels alone follow.
    scratch : Scratch
        Memory for compiled kernels.
    """

    rotation: Rotation
    seen: int
    origin: int
    slots: int
    here: Angles
    sinks: dict[int, Tensor]
    pads: tuple[int, ...] | None
    slot: Tensor | None = None
    count: Tensor | None = None
    grows: bool = False
    scratch: Scratch = field(default_factory=Scratch)

    def fits(self, memory: LayerMemory, layer: int) -> bool:
        """Whether the memory of a layer stands where the step was made for."""
        return sees_slots_alone(memory) and (memory.seen, memory.origin) == (self.seen, self.origin)

    def attend(
        self, memory: LayerMemory, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Put the token into a layer's memory, and attend; parameters as of :meth:`Forward.attend`."""
        if self._takes_kernels(memory, query, key, value):
            return self._attend_compiled(memory, query, key, value, **logits)
        if self.grows:
            raise _growing_refused()
        turned_query, turned_key = turned(query, key, self.rotation, self.here)
        if self.slot is None:
            memory.put(turned_key, value, key, self.pads)
        else:
            memory.put_at(self.slot, turned_key, value)
        keys, values = memory.keys, memory.values
        assert keys is not None and values is not None
        if self.sinks:
            keys.narrow(2, 0, memory.sinks).copy_(self.sinks[id(memory)])
            self._put_sink_values(memory)
        if self.slots < keys.shape[2]:
            keys, values = keys.narrow(2, 0, self.slots), values.narrow(2, 0, self.slots)
        return attend_all(turned_query, keys, values, **logits)

    def _takes_kernels(self, memory: LayerMemory, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether compiled kernels are to be taken, and take this."""
        if self.slot is None or self.here is None or not in_use():
            return False
        keys, values = memory.keys, memory.values
        return (
            keys is not None
            and values is not None
            and keys.shape[2] == self.slots
            and self.rotation.layout == "halves"
            and fit(*self.here, *self.sinks.values())
            and window_fits(keys, values)
            and (memory.raw is None or window_fits(memory.raw, keys))
            and token_fits(query, key, value, keys)
        )

    def _attend_compiled(
        self, memory: LayerMemory, query: Tensor, key: Tensor, value: Tensor, **logits: Unpack[Logits]
    ) -> Tensor:
        """Do the same by compiled kernels."""
        keys, values, sinks = memory.keys, memory.values, self.sinks.get(id(memory))
        assert keys is not None and values is not None and self.here is not None
        query = turn_and_put(query, key, value, *self.here, self.slot, keys, values, sinks, memory.raw)
        if sinks is not None:
            self._put_sink_values(memory)
        is_plain = logits.get("softcap") is None and logits.get("sink_logits") is None
        if is_plain and attends(query, keys, values):
            return attend(query, keys, values, self.count, logits["scaling"], self.scratch)
        if self.grows:
            raise _growing_refused()
        return attend_all(query, keys, values, **logits)

    def _put_sink_values(self, memory: LayerMemory) -> None:
        """Put the sinks' values into their slots, where padding stood."""
        if self.pads:
            assert memory.values is not None and memory.sink_values is not None
            memory.values.narrow(2, 0, memory.sinks).copy_(memory.sink_values)


def token_step(
    policy: Policy,
    memories: Sequence[LayerMemory],
    rotation: Rotation,
    like: Tensor,
    pads: tuple[int, ...] | None,
) -> TokenStep | None:
    """Return the step that windows like these take; None: they need more than the shortest way.

    Parameters
    ----------
    policy : Policy
        Which query sees what.
    memories : sequence of LayerMemory
        Of the layers, the first about to take in one token a row; their keys follow `rotation` already.
    rotation : Rotation
        The layers'.
    like : Tensor
        A query.
    pads : tuple of int or None
        The rows' padding.
    """
    if torch.is_grad_enabled():
        return None
    memory = memories[0]
    place = token_place(policy, memory, pads)
    if place is None:
        return None
    sinks = {}
    if place.sinks is not None:
        sinks = rotated_sinks(memories, rotation, rotation.angles(place.sinks, like))
    return TokenStep(
        rotation,
        memory.seen,
        memory.origin,
        place.slots,
        rotation.angles(place.at, like),
        sinks,
        pads if pads and any(pads) else None,
    )


def sees_slots_alone(memory: LayerMemory) -> bool:
    """Whether there is nothing to see but the slots: none that left them for a tier."""
    is_whole = memory.tier is None or (memory.window is not None and memory.seen < memory.window)
    return type(memory) is LayerMemory and is_whole


def takes_tokens(memory: LayerMemory) -> bool:
    """Whether a memory keeps nothing beside its window: then the shortest way may go through it."""
    return type(memory) is LayerMemory and memory.tier is None and not memory.keep_raw


def token_place(policy: Policy, memory: LayerMemory, pads: tuple[int, ...] | None) -> Place | None:
    """Return where the next token goes in `memory`; None: what it sees needs a mask or a merge."""
    index = memory.seen
    distances = policy.in_place(index - max(pads or (0,)), index)
    is_full = memory.window is not None and index >= memory.window
    if distances is None or (pads and any(pads) and not is_full):
        return None
    at = memory.frame(index)
    return Place(
        at,
        memory.slot(index),
        memory.window if is_full and memory.window is not None else index + 1,
        _as_positions([at - distance for distance in distances]),
    )


def rotated_sinks(memories: Sequence[LayerMemory], rotation: Rotation, angles: Angles) -> dict[int, Tensor]:
    """Return the sinks of each memory, by its id, rotated by `angles`, all at once."""
    keys = [memory.sink_keys for memory in memories if memory.sink_keys is not None]
    turned = rotation.turned(torch.cat(keys), angles)
    return dict(zip(map(id, memories), torch.split(turned, len(keys[0])), strict=True))


def turned(query: Tensor, key: Tensor, rotation: Rotation, angles: Angles) -> list[Tensor]:
    """Rotate a query and a key to where they stand: as one where they lie one behind the other."""
    both = _as_one(query, key)
    if both is None:
        return [rotation.turned(x, angles) for x in (query, key)]
    heads = [query.shape[1], key.shape[1]]
    return [*rotation.turned(both, angles).split_with_sizes(heads, 1)]


def _growing_refused() -> UnsupportedUseError:
    return UnsupportedUseError("no compiled kernel attends to this window while it grows")


def _as_one(first: Tensor, second: Tensor) -> Tensor | None:
    """Return the heads of two tensors as a view of both; None: they do not lie one behind the other."""
    rows, heads, *others = first.shape
    places = zip(second.shape, first.stride(), second.stride(), strict=True)
    if (
        [rows, *others] != [second.shape[0], *second.shape[2:]]
        or second.storage_offset() != first.storage_offset() + heads * first.stride(1)
        or any(ours != theirs for size, ours, theirs in places if size > 1)
        or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        or first.dtype != second.dtype
    ):
        return None
    return first.as_strided((rows, heads + second.shape[1], *others), first.stride())


def _as_positions(positions: list[int]) -> Positions | None:
    if not positions:
        return None
    if len(set(positions)) == 1:
        return positions[0]
    run = range(positions[0], positions[0] + len(positions))
    return run if positions == list(run) else torch.tensor(positions)
