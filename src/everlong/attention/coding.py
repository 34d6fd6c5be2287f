"""How a tier keeps the numbers of a block: as they are, in half precision, or in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["exact", "float16", "int8"]
"""How a tier keeps numbers: as they are; in half precision; in bytes, with a scale for each channel."""

_MOST = torch.finfo(torch.float16).max  # larger numbers, and infinite ones, are kept as this


def in_a_row(blocks: Tensor) -> Tensor:
    """Return blocks (count, batch, heads, n, d) one after another, shape (batch, heads, count * n, d)."""
    return blocks.permute(1, 2, 0, 3, 4).flatten(2, 3)


def coded(keys: Tensor, values: Tensor, precision: Precision) -> list[Tensor]:
    """Return a block as it is kept: keys and values, of bytes with their scales."""
    if precision == "exact":
        return [keys, values]
    if precision == "float16":
        return [x.float().clamp(-_MOST, _MOST).half() for x in (keys, values)]
    coded = []
    for x in (keys, values):
        x = x.float().clamp(-_MOST, _MOST)
        scale = x.abs().amax(dim=-2, keepdim=True) / 127
        coded += [(x / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale]
    return coded


def coded_bytes(keys: Tensor, values: Tensor, tokens: int, precision: Precision) -> int:
    """Return the bytes of what :func:`coded` returns of so many tokens like these."""
    channels = [x.shape[:2].numel() * x.shape[3] for x in (keys, values)]
    if precision == "int8":
        return sum(channels) * (tokens + 4)  # a scale each
    sizes = (2, 2) if precision == "float16" else (keys.element_size(), values.element_size())
    return tokens * sum(count * size for count, size in zip(channels, sizes, strict=True))


def plain(block: Sequence[Tensor], precision: Precision, dtype: torch.dtype) -> list[Tensor]:
    """Return keys and values of what :func:`coded` returned, whatever dimensions stand before."""
    if precision == "int8":
        return [(block[i] * block[i + 1]).to(dtype) for i in (0, 2)]
    return [x.to(dtype) for x in block]
