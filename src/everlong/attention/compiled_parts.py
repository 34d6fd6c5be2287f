"""Attention to parts by compiled kernels: of many queries, as in reading, or of one a row.

PyTorch's kernel for CPUs attends to one part: merging what it gives takes a dozen small calls. It takes as
long for keys that half of many queries see as if all did, and reads keys anew for each head that shares them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from everlong.kernels.blocks import Seen as SeenByMany
from everlong.kernels.blocks import Triangle, attend_blocks, attends_blocks
from everlong.kernels.direct import attend_parts, attends_parts, is_believed
from everlong.kernels.loading import is_recorded

_LEAST = 2**17  # numbers in all keys: what is smaller does without a compiler

_LEAST_PRODUCTS = 2**22  # of numbers, of many queries and all keys
_FEWEST = 64
"""Queries from which on turning keys around pays: tried with AVX-512, heads of 64 and of 256 numbers."""

Seen = tuple[Tensor, Tensor, Tensor]
"""Queries, shape (rows, heads, 1, d), and the keys and values that all of them see."""


def pays(parts: Sequence[Seen]) -> bool:
    """Whether there are compiled kernels that take these parts, enough of them and without gradients."""
    if sum(keys.numel() for _, keys, _ in parts) < _LEAST:
        return False
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for part in parts for x in part)
    return not has_gradient and attends_parts(parts) and _is_right()


def pay_for_many(parts: Sequence[SeenByMany]) -> bool:
    """Whether there are compiled kernels that take parts of many queries, as :func:`pays` says for one."""
    products = sum(query.numel() * keys.shape[2] for query, keys, *_ in parts)
    if parts[0][0].shape[2] < _FEWEST or products < _LEAST_PRODUCTS or is_recorded():
        return False
    tensors = [x for part in parts for x in part if isinstance(x, Tensor)]
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return not has_gradient and attends_blocks(parts) and _is_right_for_many()


@functools.cache
def _is_right_for_many() -> bool:
    return is_believed(_gives_the_same_for_many, "attend", "attending")


def _gives_the_same_for_many() -> bool:
    return all(map(_gives_the_same_of_size, (20, 64)))


def _gives_the_same_of_size(d: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    n, parts, logits = 70, list[SeenByMany](), list[Tensor]()
    for m, visible in ((n, Triangle.LOWER), (300, None), (n, Triangle.UPPER), (5, _seen_by_some(n, 5))):
        query, keys, values = (
            torch.randn(2, heads, count, d, generator=generator, dtype=torch.float32, device="cpu")
            for heads, count in ((6, n), (2, m), (2, m))
        )
        parts.append((query, keys, values, visible))
        seen = torch.ones(n, m, dtype=torch.bool, device="cpu")
        if isinstance(visible, Triangle):
            seen = seen.tril() if visible is Triangle.LOWER else seen.triu()
        elif visible is not None:
            seen = visible
        products = query.double() @ keys.double().repeat_interleave(3, 1).mT / 4
        logits.append(products.masked_fill(~seen, -torch.inf))
    values = torch.cat([values for _, _, values, _ in parts], 2).repeat_interleave(3, 1)
    expected = (torch.cat(logits, -1).softmax(-1) @ values.double()).float()
    return torch.allclose(attend_blocks(parts, 0.25), expected, atol=1e-5, rtol=1e-4)


def _seen_by_some(n: int, m: int) -> Tensor:
    """Return a mask, (1, 1, n, m), by which each query but the first sees some key."""
    queries, keys = (torch.arange(count, device="cpu") for count in (n, m))
    return (queries[:, None] % (m + 1) > keys)[None, None]


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
