"""Streams of any length as the rows of one batch, for as long as they write together.

Streams are aligned at their last tokens: a shorter one has padding before its first, as in any left-padded
batch, and a window that is full has the same shape whatever came before. The keys of a stream are rotated
once, to where its tokens stand in the batch; taken out again, it goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everlong.attention.cache import KeptLayer, StreamCache
from everlong.attention.layer_memory import LayerMemory
from everlong.attention.positions import Rotation
from everlong.errors import InputError

_RINGS, _SINKS = ("keys", "values", "raw"), ("sink_keys", "sink_values")
_MOVED = "what this stream held is in a batch now: go on with that, or with what its take() returns"


class StreamBatch:
    """Several streams in the rows of one cache; made by :meth:`Attachment.batch`.

    Parameters
    ----------
    caches : sequence of StreamCache
        At least one, for which :func:`why_apart` finds nothing.
    layers : dict of int to KeptLayer
        The attachment's.
    moved : bool
        Whether the streams move into the batch: no more than a layer of them is held twice,
        and nothing can go on from `caches` afterwards, nor after an error in between.

    Attributes
    ----------
    cache : StreamCache
        Of as many rows as streams, to be given to forwards of one token a row.
    """

    def __init__(
        self, caches: Sequence[StreamCache], layers: dict[int, KeptLayer], *, moved: bool = False
    ) -> None:
        longest = max(caches, key=lambda cache: cache.seen)
        pads = [longest.seen - cache.seen for cache in caches]
        self._layers = layers
        self._offsets = [cache.offset for cache in caches]
        self.cache = StreamCache(longest.policy, layers, longest.owner, longest.offset, longest.tier)
        self.cache.use_adapters([cache.adapter for cache in caches])
        self.cache.seen = longest.seen
        self.cache.rows = len(caches)
        self.cache.pads = tuple(pads) if any(pads) else None
        if moved:
            for cache in caches:
                cache.unfit = _MOVED
                cache.recorded = cache.recorded_open = None  # they hold on to what they ran with
        with torch.inference_mode(False), torch.no_grad():
            for number, memory in self.cache.memories.items():
                _fill(memory, longest.memories[number], [c.memories[number] for c in caches], pads)
                if moved:
                    for cache in caches:
                        _let_go(cache.memories[number])

    def __len__(self) -> int:
        return len(self._offsets)

    def take(self, row: int) -> StreamCache:
        """Return the stream in `row` as a cache of its own; the row stays."""
        batch, offset = self.cache, self._offsets[row]
        pad = batch.pads[row] if batch.pads else 0
        single = StreamCache(batch.policy, self._layers, batch.owner, offset, batch.tier)
        single.adapter = batch.row_adapters[row] if batch.row_adapters else batch.adapter
        single.rows, single.seen = 1, batch.seen - pad
        single.unfit = batch.unfit
        with torch.inference_mode(False), torch.no_grad():
            for number, memory in single.memories.items():
                _take(memory, batch.memories[number], row, pad)
        return single

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, at least one."""
        self.cache.batch_select_indices(torch.tensor(rows))
        self._offsets = [self._offsets[row] for row in rows]


def why_apart(caches: Sequence[StreamCache], *, tables_change: bool) -> str | None:
    """Say why streams cannot be the rows of one batch; None: they can.

    Parameters
    ----------
    caches : sequence of StreamCache
        Of one attachment.
    tables_change : bool
        Whether the model's rotary tables depend on the length of the input.
    """
    if not caches:
        raise InputError("a batch has at least one stream")
    first = caches[0]
    span = first.window
    if any(cache.policy != first.policy for cache in caches):
        return "they follow different policies"
    if unfit := next((cache.unfit for cache in caches if cache.unfit), None):
        return unfit
    if first.needs_surprisal:
        return "their policy is told the surprisal of each token"
    if any(cache.rows != 1 or cache.pads for cache in caches):
        return "they have not read anything yet, or have several rows"
    memories = [memory for cache in caches for memory in cache.memories.values()]
    if any(type(memory) is not LayerMemory or memory.tier is not None for memory in memories):
        return "what they hold is kept in a way that has no rows"
    if any(memory.pending is not None for memory in memories):
        return "they hold provisional tokens"
    if tables_change and (span is None or any(cache.seen < span for cache in caches)):
        return "the model's rotary tables depend on the length of each"
    return None


def _fill(into: LayerMemory, longest: LayerMemory, memories: list[LayerMemory], pads: list[int]) -> None:
    """Put one layer of all streams into an empty memory, aligned at their last tokens."""
    into.take_frame(longest)
    into.seen = longest.seen
    for name in (*_RINGS, *_SINKS):
        like: Tensor | None = getattr(longest, name)
        if like is not None:
            room = like.shape[2] if name in _SINKS else _room(into)
            setattr(into, name, like.new_zeros((len(memories), like.shape[1], room, like.shape[3])))
    for row, (memory, pad) in enumerate(zip(memories, pads, strict=True)):
        rotation = Rotation(memory.frequencies, memory.layout)
        shift = into.frame(pad) - memory.frame(0)
        first = 0 if into.local is None or _fits(into) else max(0, memory.seen - into.local)
        for name in _RINGS:
            buffer, target = getattr(memory, name), getattr(into, name)
            if buffer is None:
                continue
            tokens = memory.ordered(buffer)[:, :, first - memory.first :]
            if name == "keys" and shift:
                tokens = rotation.move(tokens, shift)
            into.put_run(target[row : row + 1], first + pad, tokens)
        for name in _SINKS:
            if getattr(memory, name) is not None:
                getattr(into, name)[row] = getattr(memory, name)[0]
    if into.values is not None and into.sink_values is not None and not _fits(into):
        into.values[:, :, : into.sinks] = into.sink_values


def _let_go(memory: LayerMemory) -> None:
    """Hold nothing any more."""
    for name in (*_RINGS, *_SINKS):
        setattr(memory, name, None)


def _take(into: LayerMemory, batch: LayerMemory, row: int, pad: int) -> None:
    """Put one layer of the stream in `row` into an empty memory."""
    into.take_frame(batch)
    into.origin = into.start - batch.frame(pad)
    into.seen = batch.seen - pad
    for name in _SINKS:
        if getattr(batch, name) is not None:
            setattr(into, name, getattr(batch, name)[row : row + 1].clone())
    first = max(pad, batch.first)
    for name in _RINGS:
        buffer: Tensor | None = getattr(batch, name)
        if buffer is None:
            continue
        buffer = buffer[row : row + 1]
        target = buffer.new_zeros((*buffer.shape[:2], _room(into), buffer.shape[3]))
        into.put_run(target, first - pad, batch.ordered(buffer)[:, :, first - batch.first :])
        setattr(into, name, target)
    if first > pad and into.sinks:  # the stream's first tokens have left the batch's ring, not its own window
        count = min(into.sinks, into.seen)
        assert into.keys is not None and into.values is not None
        assert into.sink_keys is not None and into.sink_values is not None
        rotation = Rotation(into.frequencies, into.layout)
        raw = into.sink_keys[:, :, :count]
        into.keys[:, :, :count] = rotation(raw, range(into.frame(0), into.frame(count)))
        into.values[:, :, :count] = into.sink_values[:, :, :count]
        if into.raw is not None:
            into.raw[:, :, :count] = raw


def _fits(memory: LayerMemory) -> bool:
    return memory.window is None or memory.seen <= memory.window


def _room(memory: LayerMemory) -> int:
    """Slots for what was seen and a token more, as far as the window goes."""
    return memory.seen + 1 if memory.window is None else min(memory.seen + 1, memory.window)
