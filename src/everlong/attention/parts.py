"""Attention over several parts as one softmax.

A policy answers, for a group of queries, a list of parts. A compiled kernel attends to all of them at once,
where there is one; else each is attended with the best kernel there is, and the partial results are merged by
their log-sum-exp in float32: exactly one softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, TypeGuard, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

from everlong.attention import compiled_parts, few_queries
from everlong.attention.cuda_parts import fused
from everlong.attention.positions import working_dtype
from everlong.kernels.blocks import Triangle, attend_blocks
from everlong.kernels.direct import attend_parts
from everlong.kernels.loading import wanted

_FLASH_CPU = torch._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True, eq=False)
class Part:
    """Some keys as a group of queries sees them, everything rotated to its place.

    Attributes
    ----------
    queries : Tensor
        Shape (batch, heads, n, d).
    keys, values : Tensor
        Shape (batch, key-value heads, m, d).
    visible : Tensor, Triangle or None
        Boolean, shape (batch or 1, 1 or heads, n, m): which query sees which key; None: all see all.
        Rows that see nothing have no weight in the merge; at least one part must show each query a key.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    visible: Tensor | Triangle | None = None


@dataclass(frozen=True, eq=False)
class Partial:
    """A part that was attended already.

    Attributes
    ----------
    output : Tensor
        Shape (batch, heads, n, d): the softmax over this part alone.
    lse : Tensor
        float32, shape (batch, heads, n): the log of the sum of the exponentials of its logits.
    """

    output: Tensor
    lse: Tensor


class Logits(TypedDict):
    """How a model makes logits of the products of queries and keys.

    Attributes
    ----------
    scaling : float
        Factor on the products.
    softcap : float or None, optional
        Logits become ``softcap * tanh(logit / softcap)`` (Gemma 2).
    sink_logits : Tensor or None, optional
        Shape (heads,): one more logit per head that takes weight but has no value (gpt-oss).
    """

    scaling: float
    softcap: NotRequired[float | None]
    sink_logits: NotRequired[Tensor | None]


def attend(parts: Sequence[Part | Partial], **logits: Unpack[Logits]) -> Tensor:
    """Attend to all `parts` under one softmax.

    Parameters
    ----------
    parts : sequence of Part or Partial
        What one group of n queries sees. No key may stand in two parts.
    **logits
        See :class:`Logits`.

    Returns
    -------
    Tensor
        Shape (batch, heads, n, d), the dtype of the values.
    """
    scaling, softcap, sink_logits = logits["scaling"], logits.get("softcap"), logits.get("sink_logits")
    if softcap is None and sink_logits is None and wanted():
        by_kernels = _attend_by_kernels(parts, scaling)
        if by_kernels is not None:
            return by_kernels
    partials = [p if isinstance(p, Partial) else _attend_one(p, scaling, softcap) for p in parts]
    if len(partials) == 1 and sink_logits is None:
        return partials[0].output
    lses = [p.lse for p in partials]
    if sink_logits is not None:
        lses.append(sink_logits.to(lses[0].dtype)[None, :, None].expand_as(lses[0]))
    total = torch.logsumexp(torch.stack(lses), dim=0)
    weights = [(p.lse - total).exp().unsqueeze(-1) for p in partials]
    merged = partials[0].output.to(total.dtype) * weights[0]
    for partial, weight in zip(partials[1:], weights[1:], strict=True):
        merged = torch.addcmul(merged, partial.output.to(total.dtype), weight)
    return merged.to(partials[0].output.dtype)


def _attend_by_kernels(parts: Sequence[Part | Partial], scaling: float) -> Tensor | None:
    """Attend to parts by compiled kernels, where there are some that pay."""
    if all(isinstance(p, Part) and p.queries.shape[2] > 1 for p in parts):
        many = [(p.queries, p.keys, p.values, p.visible) for p in parts if isinstance(p, Part)]
        return attend_blocks(many, scaling) if compiled_parts.pay_for_many(many) else None
    if len(parts) == 1:
        return None
    one = [(p.queries.contiguous(), p.keys, p.values) for p in parts if _is_seen_by_one(p)]
    if len(one) == len(parts) and compiled_parts.pays(one):
        return attend_parts(one, scaling)
    return None


def attend_all(query: Tensor, keys: Tensor, values: Tensor, **logits: Unpack[Logits]) -> Tensor:
    """Attend to a single part of which every query sees all; parameters and result as of :func:`attend`."""
    part, scaling = Part(query, keys, values), logits["scaling"]
    if logits.get("softcap") is None and logits.get("sink_logits") is None and _flash_fits(part):
        if few_queries.pays(query, keys, values):
            return few_queries.attend_few(query, keys, values, scaling)
        if _flash_takes_grouped_heads():
            output: Tensor = _FLASH_CPU(query, keys, values, 0.0, False, attn_mask=None, scale=scaling)[0]
            return output
    return attend([part], **logits)


def merge_logits(logits: Tensor, values: Tensor) -> Partial:
    """Attend with finished logits to values of each query's own.

    Parameters
    ----------
    logits : Tensor
        float32, shape (batch, heads, n, k), -inf where there is no key.
    values : Tensor
        Shape (batch, heads, n, k, d).
    """
    logits = logits.clamp(min=_HIDDEN)
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse.unsqueeze(-1)).exp()
    return Partial((weights.unsqueeze(-2) @ values.to(logits.dtype)).squeeze(-2).to(values.dtype), lse)


_ROWS = 256  # queries whose logits are held at once where no kernel fits
_HIDDEN = -1e30  # a hidden key's logit: finite, so that a query that sees nothing of a part stays finite


def _is_seen_by_one(part: Part | Partial) -> TypeGuard[Part]:
    """Whether one query a row sees all keys of a part."""
    return isinstance(part, Part) and part.visible is None and part.queries.shape[2] == 1


def _attend_one(part: Part, scaling: float, softcap: float | None) -> Partial:
    if part.visible is Triangle.UPPER:  # read backwards, it is a lower one
        return _backwards(_attend_one(_backwards_part(part), scaling, softcap))
    if softcap is None and _flash_fits(part):
        return _flash(part, scaling)
    if softcap is None and part.queries.device.type == "cuda" and not _needs_gradient(part):
        visible = part.visible
        bias = _bias(visible, part.queries.dtype) if isinstance(visible, Tensor) else None
        found = fused(
            part.queries,
            part.keys,
            part.values,
            bias,
            is_causal=visible is Triangle.LOWER,
            scaling=scaling,
        )
        if found is not None:
            return Partial(*found)
    return _explicit_rows(part, scaling, softcap)


def _backwards_part(part: Part) -> Part:
    return Part(part.queries.flip(2), part.keys.flip(2), part.values.flip(2), Triangle.LOWER)


def _backwards(partial: Partial) -> Partial:
    return Partial(partial.output.flip(2), partial.lse.flip(2))


def _flash(part: Part, scaling: float) -> Partial:
    visible, keys, values = part.visible, part.keys, part.values
    bias = _bias(visible, part.queries.dtype) if isinstance(visible, Tensor) else None
    if not _flash_takes_grouped_heads():
        groups = part.queries.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    is_causal = visible is Triangle.LOWER
    return Partial(*_FLASH_CPU(part.queries, keys, values, 0.0, is_causal, attn_mask=bias, scale=scaling))


def _flash_fits(part: Part) -> bool:
    """Whether the CPU flash kernel computes this part; its log-sum-exp has no gradient."""
    return (
        part.queries.device.type == "cpu"
        and not _needs_gradient(part)
        and part.queries.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and part.keys.shape[-2] > 0
    )


def _needs_gradient(part: Part) -> bool:
    return torch.is_grad_enabled() and (
        part.queries.requires_grad or part.keys.requires_grad or part.values.requires_grad
    )


@functools.cache
def _flash_takes_grouped_heads() -> bool:
    """Whether this torch's CPU kernel takes fewer key-value heads than query heads, and gets them right."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 2, 8, generator=generator) for heads in (4, 2, 2))
    every = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    try:
        return all(
            torch.allclose(
                _FLASH_CPU(q, k, v, 0.0, causal)[0],
                F.scaled_dot_product_attention(q, *every, is_causal=causal),
                atol=1e-5,
            )
            for causal in (False, True)
        )
    except RuntimeError:
        return False


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    hidden = max(_HIDDEN, torch.finfo(dtype).min / 2)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, hidden)


def _explicit_rows(part: Part, scaling: float, softcap: float | None) -> Partial:
    """Attend with plain operations, some queries at a time, so that the logits never take n x m numbers."""
    n, visible, pieces = part.queries.shape[2], part.visible, []
    for begin in range(0, n, _ROWS):
        stop = min(begin + _ROWS, n)
        keys, values, seen = part.keys, part.values, visible
        if isinstance(visible, Triangle):
            keys, values = keys[:, :, :stop], values[:, :, :stop]
            index = torch.arange(stop, device=keys.device)
            seen = index <= index[begin:, None]
        elif visible is not None and visible.shape[-2] > 1:
            seen = visible[..., begin:stop, :]
        pieces.append(_explicit(Part(part.queries[:, :, begin:stop], keys, values, seen), scaling, softcap))
    if len(pieces) == 1:
        return pieces[0]
    return Partial(torch.cat([p.output for p in pieces], 2), torch.cat([p.lse for p in pieces], 2))


def _explicit(part: Part, scaling: float, softcap: float | None) -> Partial:
    """Attend with plain operations in float32 (or float64): any device, any gradient."""
    dtype = working_dtype(part.queries)
    batch, heads, n, size = part.queries.shape
    kv_heads, m = part.keys.shape[1], part.keys.shape[2]
    groups = heads // kv_heads
    queries = part.queries.to(dtype).reshape(batch, kv_heads, groups * n, size)
    logits = (queries @ part.keys.to(dtype).transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.reshape(batch, heads, n, m)
    if isinstance(part.visible, Tensor):
        logits = logits.masked_fill(~part.visible, _HIDDEN)
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse.unsqueeze(-1)).exp().reshape(batch, kv_heads, groups * n, m)
    output = (weights @ part.values.to(dtype)).reshape(batch, heads, n, part.values.shape[-1])
    return Partial(output.to(part.values.dtype), lse)
