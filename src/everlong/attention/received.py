"""The attention that keys receive: exact softmax weights, as policies weigh tokens by them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from everlong.attention.parts import Partial
from everlong.attention.positions import working_dtype
from everlong.attention.view import LayerView, Queries

QUERIES, SINK_LOGITS = "queries", "sink_logits"
"""Notes of a memory's index: the latest raw queries (batch, heads, n, d), and a model's own logits
(batch, heads)."""

_ROWS = 256  # queries whose weights are held at once
_HIDDEN = -1e30


@dataclass(frozen=True)
class Weighing:
    """How logits are made of products; members as of :class:`~everlong.attention.parts.Logits`."""

    scaling: float
    softcap: float | None
    sink_logits: Tensor | None
    """Shape (heads,) or (batch, heads)."""


def weigh(
    queries: Tensor, keys: Tensor, values: Tensor | None, visible: Tensor, how: Weighing
) -> tuple[Partial | None, Tensor]:
    """Attend, and add up the weights that each key receives.

    Parameters
    ----------
    queries : Tensor
        Rotated, shape (batch, heads, n, d).
    keys, values : Tensor
        Shape (batch, key-value heads, m, d); without values nothing is attended.
    visible : Tensor
        Boolean, shape (batch or 1, 1, n, m). Queries that see nothing give nothing.
    how : Weighing
        The model's way.

    Returns
    -------
    Partial or None
        What the queries attend to.
    Tensor
        float32 (or float64), shape (batch, key-value heads, m): the weights under the one softmax of each
        query, the model's own logits in it, summed over queries and over the query heads of each key's head.
    """
    batch, heads, n, size = queries.shape
    kv_heads, m = keys.shape[1:3]
    dtype = working_dtype(queries)
    received = torch.zeros(batch, kv_heads, m, dtype=dtype, device=keys.device)
    outputs, lses = [], []
    for begin in range(0, n, _ROWS):
        some = queries[:, :, begin : begin + _ROWS].to(dtype)
        sees = visible[:, :, begin : begin + _ROWS]
        grouped = some.reshape(batch, kv_heads, -1, size)
        logits = (grouped @ keys.to(dtype).transpose(-1, -2)) * how.scaling
        if how.softcap is not None:
            logits = torch.tanh(logits / how.softcap) * how.softcap
        logits = logits.view(batch, heads, -1, m).masked_fill(~sees, _HIDDEN)
        lse = torch.logsumexp(logits, -1)
        weights = (logits - lse[..., None]).exp()
        if values is not None:
            mixed = weights.reshape(batch, kv_heads, -1, m) @ values.to(dtype)
            outputs.append(mixed.view(batch, heads, -1, values.shape[-1]).to(values.dtype))
            lses.append(lse)
        share = sees.any(-1).to(dtype).expand_as(lse)
        if how.sink_logits is not None:
            sink = how.sink_logits.to(dtype)[..., None]
            share = share * (lse - torch.logaddexp(lse, sink)).exp()
        given = (weights * share[..., None]).detach()
        received += given.reshape(batch, kv_heads, -1, m).sum(2)
    partial = Partial(torch.cat(outputs, 2), torch.cat(lses, 2)) if outputs else None
    return partial, received


def note_queries(queries: Queries, view: LayerView, count: int) -> None:
    """Note the latest `count` raw queries of a layer in its memory's index, and the model's own logits."""
    index = view.memory.index
    latest = queries.raw[:, :, -count:].detach()
    with torch.inference_mode(False), torch.no_grad():  # later forwards, in whatever mode, use them
        before = index.get(QUERIES)
        if before is not None:
            latest = torch.cat((before, latest), 2)[:, :, -count:]
        index[QUERIES] = latest.clone()
        if view.call.sink_logits is not None:
            sinks = view.call.sink_logits.detach()
            index[SINK_LOGITS] = sinks.expand(len(latest), -1).clone()
