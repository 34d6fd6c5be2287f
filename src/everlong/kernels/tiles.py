"""How the codes of keys lie, so that a processor multiplies many at once, and has no lanes to add up.

A tile has the codes of `TILE` tokens that follow one another, two channels of one token side by side, then
those of the next token: what instructions for products of whole numbers take. Tiles begin at tokens whose
numbers are multiples of `TILE`; places that no token has, and a channel that makes their number even, are
nought.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

TILE = 32
"""Tokens of a tile."""

PAIRS = 8
"""Pairs of channels that are rotated at once."""

MOST_CHANNELS = 512
"""Channels whose products with 16 bits are added up in 32 without an overflow."""


def in_tiles(codes: Tensor, first: int) -> Tensor:
    """Return codes of tokens from `first` on, (..., n, d), as (..., tiles, pairs of channels, TILE, 2)."""
    before, (*others, n, d) = first % TILE, codes.shape
    codes = pad(codes, (0, d % 2, before, -(before + n) % TILE))
    return codes.view(*others, -1, TILE, codes.shape[-1] // 2, 2).transpose(-3, -2).contiguous()


def out_of_tiles(tiles: Tensor, first: int, n: int, d: int) -> Tensor:
    """Return the codes that :func:`in_tiles` was given, (..., n, d)."""
    before, pairs = first % TILE, tiles.view(torch.int16)[..., 0]  # moved as what is twice as wide
    codes = pairs.transpose(-2, -1).flatten(-3, -2).contiguous().view(torch.int8)
    return codes[..., before : before + n, :d]


def codes_at(tiles: Tensor, first: int, heads: Tensor, tokens: Tensor, d: int) -> Tensor:
    """Return codes of single tokens, each of its own head: (m, d), of (heads, tiles, pairs, TILE, 2)."""
    places = tokens - first // TILE * TILE
    return tiles[heads, places // TILE, :, places % TILE].flatten(1)[:, :d]
