"""Parts on CUDA: PyTorch's fused kernels, which return the log-sum-exp that merging needs.

Written without a GPU at hand. Before a kernel is used, it is held against plain operations on the device
itself, once for each kind of part; where it fails or differs, plain operations it is.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention
_ALIGNED = 16  # keys, to a multiple of which a bias is allocated
_HALF = (torch.float16, torch.bfloat16)


def fused(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, *, is_causal: bool, scaling: float
) -> tuple[Tensor, Tensor] | None:
    """Attend by a fused kernel.

    Parameters
    ----------
    queries : Tensor
        On a CUDA device, shape (batch, heads, n, d).
    keys, values : Tensor
        Shape (batch, key-value heads, m, d).
    bias : Tensor or None
        Added to the logits, shape (batch or 1, heads or 1, n, m).
    is_causal : bool
        Whether query i sees keys 0 to i only, n = m.
    scaling : float
        Factor on the products of queries and keys.

    Returns
    -------
    tuple of Tensor or None
        Output, shape (batch, heads, n, d), and log-sum-exp, float32, (batch, heads, n). None: no kernel of
        this device computes this part right.
    """
    kind = queries.device, queries.dtype, queries.shape[-1], bias is not None, is_causal
    if queries.dtype not in (*_HALF, torch.float32) or not _works(*kind):
        return None
    return _run(queries, keys, values, bias, is_causal, scaling)


def _run(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, is_causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    groups = queries.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    n = queries.shape[2]
    if bias is None and queries.dtype in _HALF:
        output, lse = _FLASH(queries, keys, values, 0.0, is_causal, False, scale=scaling)[:2]
    else:
        bias = None if bias is None else _aligned(bias.expand(len(queries), queries.shape[1], -1, -1))
        output, lse = _EFFICIENT(queries, keys, values, bias, True, 0.0, is_causal, scale=scaling)[:2]
    return output, lse[..., :n].float()


def _aligned(bias: Tensor) -> Tensor:
    """Return `bias` in memory whose rows begin where the kernel can load them at once."""
    length = bias.shape[-1]
    room = -(-length // _ALIGNED) * _ALIGNED
    copy = bias.new_zeros((*bias.shape[:-1], room))
    copy[..., :length] = bias
    return copy[..., :length]


@functools.lru_cache(maxsize=64)
def _works(device: torch.device, dtype: torch.dtype, size: int, is_masked: bool, is_causal: bool) -> bool:
    """Whether the kernel for this kind of part gives what plain operations give on this device."""
    generator = torch.Generator().manual_seed(0)
    n, m = (37, 37) if is_causal else (37, 53)
    q, k, v = (
        torch.randn(2, heads, length, size, generator=generator).to(device, dtype)
        for heads, length in ((4, n), (2, m), (2, m))
    )
    bias = None
    if is_masked:
        hidden = torch.rand(1, 1, n, m, generator=generator) < 0.3
        hidden[..., 0] = False
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, -1e4).to(device, dtype)
    scaling = size**-0.5
    logits = q.float() @ k.float().repeat_interleave(2, 1).transpose(-1, -2) * scaling
    if bias is not None:
        logits = logits + bias.float()
    if is_causal:
        logits = logits.masked_fill(torch.ones(n, m, device=device).tril() == 0, -torch.inf)
    expected = logits.softmax(-1) @ v.float().repeat_interleave(2, 1), logits.logsumexp(-1)
    try:
        with torch.no_grad():
            found = _run(q, k, v, bias, is_causal, scaling)
    except RuntimeError:
        return False
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    return all(
        torch.allclose(ours.float(), theirs, atol=tolerance, rtol=tolerance)
        for ours, theirs in zip(found, expected, strict=True)
    )
