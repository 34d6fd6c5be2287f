"""Streams that stand beside one another: read apart, each from the same position on, then seen together."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from everlong.attention.cache import StreamCache
from everlong.attention.forward import Layers
from everlong.attention.full import FullAttention
from everlong.attention.view import LayerCall, LayerView
from everlong.errors import UnsupportedModelError, UnsupportedUseError


def require_beside(layers: Layers) -> None:
    """Raise unless a model's streams can stand beside one another.

    Raises
    ------
    UnsupportedModelError
        It has layers with a local window: which tokens of which stream are near is not defined.
    UnsupportedUseError
        Its rotation depends on the length of its input.
    """
    if len(layers.full) < len(layers):
        raise UnsupportedModelError(
            f"{len(layers) - len(layers.full)} of {len(layers)} layers of this model have a local window: "
            "what is near is not defined for streams side by side. Read the text as one stream, such as by "
            "`everlong read`, or with InfiniRetri, or take another model"
        )
    if layers.tables_change(FullAttention()):
        raise UnsupportedUseError(
            "this model's rotation depends on the length of its input: keys that were read apart do not fit "
            "together; read the text as one stream, such as by `everlong read`, or with InfiniRetri"
        )


def beside(caches: Iterable[StreamCache], shared: int, layers: Layers) -> StreamCache:
    """Put streams beside one another: what follows sees all of them, from behind the longest.

    Parameters
    ----------
    caches : iterable of StreamCache
        One row each, under full attention; taken one after another, and the first is used up.
    shared : int
        Tokens that all of them begin with, at position 0; they are kept once.
    layers : Layers
        The model's.

    Returns
    -------
    StreamCache
        The keys of all tokens stand at the positions at which they were read, the next token at the first
        that none of the streams has.
    """
    require_beside(layers)
    streams = iter(caches)
    joined = next(streams)
    farthest = joined.seen
    for stream in streams:
        farthest = max(farthest, stream.seen)
        for number, rotation in layers.rotations(FullAttention(), stream.seen).items():
            mine, other = joined.memories[number], stream.memories[number]
            assert other.keys is not None and other.values is not None
            keys, values = (buffer[:, :, shared : other.seen] for buffer in (other.keys, other.values))
            call = LayerCall(number, rotation)
            with torch.inference_mode():
                mine.settle(LayerView(mine, call, mine.seen + keys.shape[2], (keys, values, keys)))
        joined.seen += stream.seen - shared
    joined.folded = joined.seen - farthest
    for memory in joined.memories.values():
        memory.origin = memory.start + joined.folded
    return joined
