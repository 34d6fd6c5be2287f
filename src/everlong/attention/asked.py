"""Full attention that takes note of what a question attends to, in one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.cache import StreamCache
from everlong.attention.full import FullAttention
from everlong.attention.positions import working_dtype
from everlong.attention.view import LayerView, Queries

_NOTE = "asked"
_QUERIES = 64  # whose weights are held at once


@dataclass(frozen=True)
class AskedAttention(FullAttention):
    """Full attention, and a note of the weights that a question's tokens give to those before it.

    For those who drive a model, not for sessions: it is not registered, and not saved.

    Parameters
    ----------
    layer : int
        The layer whose attention is noted, one with full attention.
    begin, stop : int
        The question's tokens, by their index in the stream, padding counted.
    """

    layer: int = 0
    begin: int = 0
    stop: int = 0

    def in_place(self, row_index: int, index: int) -> Sequence[int] | None:
        """Never: the shortest way takes no notes."""
        return None

    def observe(self, queries: Queries, view: LayerView) -> None:
        """Add up the weights of the question's tokens among these queries."""
        begin, stop = max(self.begin, queries.first), min(self.stop, queries.stop)
        if view.call.layer != self.layer or begin >= stop:
            return
        index = view.memory.index
        if _NOTE not in index:
            index[_NOTE] = torch.zeros(len(queries.raw), self.begin, device=queries.raw.device)
        keys = view.keys(0, stop)
        keys = keys.to(working_dtype(keys))
        for first in range(begin, stop, _QUERIES):
            last = min(first + _QUERIES, stop)
            asked = queries.placed[:, :, first - queries.first : last - queries.first].to(keys.dtype)
            weights = _weights(asked, keys[:, :, :last], first, view)
            index[_NOTE] += weights[..., : self.begin].sum((1, 2)).to(index[_NOTE].dtype)


def received(cache: StreamCache) -> Tensor:
    """Return what each token before the question received of its attention.

    Parameters
    ----------
    cache : StreamCache
        Under :class:`AskedAttention`, the question read.

    Returns
    -------
    Tensor (rows, begin), float32
        The weights, summed over the question's tokens and all query heads.
    """
    (note,) = (memory.index[_NOTE] for memory in cache.memories.values() if _NOTE in memory.index)
    return note


def _weights(asked: Tensor, keys: Tensor, first: int, view: LayerView) -> Tensor:
    """Return the softmax over keys (batch, key-value heads, m, d) of queries (batch, heads, n, d).

    The first of the queries is token `first` of the stream, the last of the keys the last query's own.
    """
    batch, heads, n, size = asked.shape
    folded = asked.reshape(batch, keys.shape[1], -1, size)
    logits = (folded @ keys.transpose(-1, -2)).reshape(batch, heads, n, -1) * view.call.scaling
    if view.call.softcap is not None:
        logits = torch.tanh(logits / view.call.softcap) * view.call.softcap
    at = torch.arange(keys.shape[2], device=keys.device)
    hidden = at > torch.arange(first, first + n, device=keys.device)[:, None]
    if view.pads:
        hidden = hidden | (at < view.pad_column(keys.device))
    logits = logits.masked_fill(hidden, -torch.inf)
    if view.call.sink_logits is not None:
        sink = view.call.sink_logits.to(logits.dtype)[None, :, None, None].expand(batch, heads, n, 1)
        logits = torch.cat((logits, sink), -1)
    return logits.softmax(-1)[..., : keys.shape[2]]
