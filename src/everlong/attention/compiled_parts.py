"""One query a row and several parts, by compiled kernels: a written token that sees what was recalled.

PyTorch's kernel for CPUs reads keys anew for each head that shares them, and merging what it gives takes a
dozen small calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from everlong.kernels.direct import attend_parts, attends_parts, is_believed

_LEAST = 2**17  # numbers in all keys: what is smaller does without a compiler

Seen = tuple[Tensor, Tensor, Tensor]
"""Queries, shape (rows, heads, 1, d), and the keys and values that all of them see."""


def pays(parts: Sequence[Seen]) -> bool:
    """Whether there are compiled kernels that take these parts, enough of them and without gradients."""
    if sum(keys.numel() for _, keys, _ in parts) < _LEAST:
        return False
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for part in parts for x in part)
    return not has_gradient and attends_parts(parts) and _is_right()


@functools.cache
def _is_right() -> bool:
    return is_believed(_gives_the_same, "attend")


def _gives_the_same() -> bool:
    generator = torch.Generator().manual_seed(0)
    parts: list[Seen] = []
    for m in (5, 300, 128):
        query, keys, values = (
            torch.randn(2, heads, n, 20, generator=generator, dtype=torch.float32, device="cpu")
            for heads, n in ((6, 1), (2, m), (2, m))
        )
        parts.append((query, keys, values))
    logits = torch.cat([query.view(2, 2, 3, 20) @ keys.mT / 4 for query, keys, _ in parts], -1)
    expected = (logits.softmax(-1) @ torch.cat([values for *_, values in parts], 2)).view(2, 6, 1, 20)
    return torch.allclose(attend_parts(parts, 0.25), expected, atol=1e-5, rtol=1e-4)
