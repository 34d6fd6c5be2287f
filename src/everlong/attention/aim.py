"""Where the next token goes in every layer, once steps of writing are static.

That they are in windows that are full, and, where a kernel reads from a tensor how many slots are seen, in
those that have room for some tokens more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from everlong.attention.cache import StreamCache
from everlong.attention.forward import Layers
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import Policy
from everlong.attention.positions import Rotation
from everlong.attention.token_step import Place, sees_slots_alone, takes_tokens, token_place


@dataclass(frozen=True, eq=False)
class Aim:
    """Where the next token goes in layers that are alike.

    Attributes
    ----------
    policy : Policy
        Theirs.
    rotation : Rotation
        Theirs, at present.
    memories : dict of int to LayerMemory
        By the layer's number.
    place : Place
        The same in each.
    grows : bool
        Whether the windows are not full: the next token sees one slot more.
    """

    policy: Policy
    rotation: Rotation
    memories: dict[int, LayerMemory]
    place: Place
    grows: bool


def aims(cache: StreamCache, layers: Layers, *, growing: bool = False) -> list[Aim] | None:
    """Return where the next token of each row goes, kind of layer by kind; None: the step is not static.

    Stored keys are brought to the frame that the token needs.

    Parameters
    ----------
    cache : StreamCache
        What the tokens are written on.
    layers : Layers
        The model's.
    growing : bool
        Whether windows that are not full will do.
    """
    if layers.share_keys:
        return None
    is_whole = _sees_all(cache)
    if not is_whole and (not growing or any(cache.pads or ())):
        return None
    growing = growing and not layers.tables_change(cache.policy)
    found: list[Aim] = []
    memo: dict[Any, Any] = {}
    for kind in layers.kinds:
        policy = layers.policy(kind[0], cache.policy)
        length = cache.seen + 1 if policy.span is None else min(cache.seen + 1, policy.span)
        memories = {layer.index: cache.memories[layer.index] for layer in kind}
        first = memories[kind[0].index]
        grows = growing and not _is_full(first)
        if not all((_has_room if grows else _is_full)(memory) for memory in memories.values()):
            return None
        rotation = layers.rotation(kind[0], policy, length, memo)
        for memory in memories.values():
            memory.follow(rotation, 1)
        if any((m.seen, m.origin) != (first.seen, first.origin) for m in memories.values()):
            return None
        place = token_place(policy, first, cache.pads)
        if place is None:
            return None
        found.append(Aim(policy, rotation, memories, place, grows))
    return found if is_whole or any(aim.grows for aim in found) else None


def next_aims(latest: list[Aim], pads: tuple[int, ...] | None) -> list[Aim] | None:
    """Return where the token after the last one goes, nothing but that having been put in; None: look anew.

    Parameters
    ----------
    latest : list of Aim
        Of the last token.
    pads : tuple of int or None
        The rows' padding.
    """
    found: list[Aim] = []
    for aim in latest:
        memory = next(iter(aim.memories.values()))
        if memory.outgrows_frame(1) or (aim.grows and not _has_room(memory)):
            return None
        place = token_place(aim.policy, memory, pads)
        if place is None:
            return None
        found.append(replace(aim, place=place))
    return found


def one_further(aim: Aim) -> Aim:
    """Return the aim of the token after this one, in the same frame; called once this one was put in."""
    memory = next(iter(aim.memories.values()))
    sinks = aim.place.sinks
    if sinks is not None:
        sinks = range(sinks.start + 1, sinks.stop + 1) if isinstance(sinks, range) else sinks + 1
    slots = aim.place.slots + aim.grows
    place = aim.place._replace(at=aim.place.at + 1, slot=memory.slot(memory.seen), slots=slots, sinks=sinks)
    return replace(aim, place=place)


def _sees_all(cache: StreamCache) -> bool:
    """Whether the shortest row has as many tokens as a query may see, so that positions stay."""
    span = cache.policy.span
    return span is not None and cache.seen - max(cache.pads or (0,)) >= span


def _is_full(memory: LayerMemory) -> bool:
    window = memory.window
    return (
        takes_tokens(memory)
        and window is not None
        and memory.seen >= window
        and memory.pending is None
        and memory.keys is not None
        and memory.keys.shape[2] == window
    )


def _has_room(memory: LayerMemory) -> bool:
    """Whether a window has its sinks, and slots for two tokens more: a step is recorded one further."""
    return (
        sees_slots_alone(memory)
        and memory.pending is None
        and memory.keys is not None
        and memory.sinks <= memory.seen <= memory.keys.shape[2] - 2
    )
