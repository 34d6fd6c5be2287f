"""Keys looked at by a compiled kernel, each read once for all that asks, in bytes or as they are.

PyTorch multiplies bytes by bytes: what asks is rounded for that, and a processor without instructions for it
is slow.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from everlong.kernels.direct import Segments, is_believed, look, looks
from everlong.kernels.loading import wanted

_LEAST = 2**17  # products of numbers: what is smaller does without a compiler


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
    codes = torch.randint(-127, 128, (2, 50, 20), generator=generator, dtype=torch.int8, device="cpu")
    asked, scales, centers = (
        torch.randn(2, n, 20, generator=generator, dtype=torch.float32, device="cpu") for n in (3, 4, 4)
    )
    keys = codes * scales.repeat_interleave(16, 1)[:, 3:53] + centers.repeat_interleave(16, 1)[:, 3:53]
    expected = (asked @ keys[:, 5:].mT).view(2, 3, 9, 5).amax(3)
    spread = scales.transpose(0, 1).contiguous(), centers.transpose(0, 1).contiguous()
    for tokens, some in ((codes, spread), (keys, None)):
        found = torch.full_like(expected, -torch.inf)
        pieces = tokens[:, :13], tokens[:, 13:29], tokens[:, 29:45], tokens[:, 45:]
        look(asked, Segments(pieces, first=3, segment=16), some, found, begin=8, stop=53, block=5)
        if not torch.allclose(found, expected, atol=1e-3, rtol=1e-4):
            return False
    return True
