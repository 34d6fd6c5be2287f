"""Where the next token goes in every layer, once all windows are full and steps of writing are static."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from everlong.attention.cache import StreamCache
from everlong.attention.forward import Layers
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.policy import Policy
from everlong.attention.positions import Rotation
from everlong.attention.token_step import Place, takes_tokens, token_place


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
    """

    policy: Policy
    rotation: Rotation
    memories: dict[int, LayerMemory]
    place: Place


def aims(cache: StreamCache, layers: Layers) -> list[Aim] | None:
    """Return where the next token of each row goes, kind of layer by kind; None: the step is not static.

    Stored keys are brought to the frame that the token needs.
    """
    span = cache.policy.span
    if layers.share_keys or span is None:
        return None
    if cache.seen - max(cache.pads or (0,)) < span:
        return None
    found: list[Aim] = []
    memo: dict[Any, Any] = {}
    for kind in layers.kinds:
        policy = layers.policy(kind[0], cache.policy)
        length = cache.seen + 1 if policy.span is None else min(cache.seen + 1, policy.span)
        memories = {layer.index: cache.memories[layer.index] for layer in kind}
        first = memories[kind[0].index]
        if not all(takes_tokens(memory) and _is_full(memory) for memory in memories.values()):
            return None
        rotation = layers.rotation(kind[0], policy, length, memo)
        for memory in memories.values():
            memory.follow(rotation, 1)
        if any((m.seen, m.origin) != (first.seen, first.origin) for m in memories.values()):
            return None
        place = token_place(policy, first, cache.pads)
        if place is None:
            return None
        found.append(Aim(policy, rotation, memories, place))
    return found


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
        place = None if memory.outgrows_frame(1) else token_place(aim.policy, memory, pads)
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
    place = aim.place._replace(at=aim.place.at + 1, slot=memory.slot(memory.seen), sinks=sinks)
    return replace(aim, place=place)


def _is_full(memory: LayerMemory) -> bool:
    window = memory.window
    return (
        window is not None
        and memory.seen >= window
        and memory.pending is None
        and memory.keys is not None
        and memory.keys.shape[2] == window
    )
