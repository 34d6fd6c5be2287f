"""Keys looked at by a compiled kernel, each read once for all that asks, in bytes or as they are.

What asks is rounded to 16 bits for codes. PyTorch multiplies bytes by bytes alone: it is rounded to 8 for
that, and a processor without instructions for it is slow.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from everlong.kernels.direct import Segments, is_believed, look, looks
from everlong.kernels.loading import wanted
from everlong.kernels.team import has_team
from everlong.kernels.tiles import MOST_CHANNELS, TILE, in_tiles

_LEAST = 2**17  # products of numbers: what is smaller does without a compiler


def may_take(keys: Tensor) -> bool:
    """Whether the kernel may take codes of keys like these: they are laid in tiles for it, else plain."""
    return wanted() and has_team() and keys.dtype != torch.float64 and keys.shape[-1] <= MOST_CHANNELS


def may_pay(asked: Tensor, tokens: int) -> bool:
    """Whether it may pay to take the kernel for so many tokens; how their keys lie is not looked at."""
    is_plain = asked.dtype == torch.float32 and asked.device.type == "cpu"
    return is_plain and asked.numel() * tokens >= _LEAST and wanted()


def pays(asked: Tensor, segments: Segments, found: Tensor) -> bool:
    """Whether there is a kernel that takes what asks, keys or their codes, and maxima like these."""
    return looks(asked, segments, found) and _is_right()


@functools.cache
def _is_right() -> bool:
    return is_believed(_gives_the_same, "look at keys")


def _gives_the_same() -> bool:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (2, 90, 20), generator=generator, dtype=torch.int8, device="cpu")
    asked, scales, centers = (
        torch.randn(2, n, 20, generator=generator, dtype=torch.float32, device="cpu") for n in (7, 3, 3)
    )
    scale, center = (x.repeat_interleave(TILE, 1)[:, 3:93] for x in (scales, centers))
    keys = codes * scale + center
    expected = (asked @ keys[:, 5:].mT).view(2, 7, 17, 5).amax(3)
    cuts = ((3, TILE), (TILE, 2 * TILE), (2 * TILE, 93))
    tiles = [in_tiles(codes[:, begin - 3 : stop - 3], begin) for begin, stop in cuts]
    parts = [keys[:, begin - 3 : stop - 3] for begin, stop in cuts]
    spread = scales.transpose(0, 1).contiguous(), centers.transpose(0, 1).contiguous()
    for pieces, some in ((tiles, spread), (parts, None)):
        found = torch.full_like(expected, -torch.inf)
        segments = Segments(pieces, first=3, stop=93, segment=TILE)
        look(asked, segments, some, found, begin=8, stop=93, block=5)
        if not torch.allclose(found, expected, atol=0.05, rtol=1e-4):
            return False
    return True
