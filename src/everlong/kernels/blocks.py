"""Attention of many queries to several parts under one softmax, as a kernel takes it: in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from everlong.kernels.calls import given_to, require
from everlong.kernels.loading import compiled
from everlong.kernels.team import asking_addresses, has_team, in_every_thread


class Triangle(Enum):
    """Which of n keys each of n queries sees, where a kernel can leave out the other half."""

    LOWER = "query i sees keys 0 to i"
    UPPER = "query i sees keys i to n - 1"


Seen = tuple[Tensor, Tensor, Tensor, Tensor | Triangle | None]
"""Queries, (rows, heads, n, d), keys and values, (rows, key-value heads, m, d), and which query sees which
key: boolean, (rows or 1, heads or 1, n or 1, m); a triangle; None: all see all."""


def attends_blocks(parts: Sequence[Seen]) -> bool:
    """Whether :func:`attend_blocks` takes these: float32 on the CPU, each vector in one piece."""
    (rows, heads, n, d), kv_heads = parts[0][0].shape, parts[0][1].shape[1]
    return (
        heads % kv_heads == 0
        and has_team()
        and all(
            query.shape == (rows, heads, n, d)
            and keys.shape == values.shape == (rows, kv_heads, keys.shape[2], d)
            and min(rows, n, d, keys.shape[2]) > 0
            and all(map(_is_whole, (query, keys, values)))
            and _is_seen(visible, (rows, heads, n, keys.shape[2]))
            for query, keys, values, visible in parts
        )
    )


def attend_blocks(parts: Sequence[Seen], scaling: float) -> Tensor:
    """Attend to several parts under one softmax.

    Parameters
    ----------
    parts : sequence of Seen
        All with as many rows, heads and dimensions; each query must see some key.
    scaling : float
        Factor on the products.

    Returns
    -------
    Tensor
        Shape (rows, heads, n, d).
    """
    require(attends_blocks(parts), "attend_blocks")
    kernels, query, threads = compiled("attending"), parts[0][0], torch.get_num_threads()
    (rows, heads, n, d), kv_heads = query.shape, parts[0][1].shape[1]
    columns, groups, out = kernels.columns_of(d), rows * kv_heads, query.new_empty(query.shape)
    scratch = query.new_empty(threads * kernels.room(d, columns))
    given: list[Tensor | float] = [
        out,
        scratch,
        *asking_addresses(),
        len(parts),
    ]  # held until they are through
    given += [rows, heads, kv_heads, n, d, float(scaling)]
    for asking, keys, values, visible in parts:
        count, kind, mask = keys.shape[2], kernels.ALL, [0, 0, 0, 0]
        turned = query.new_empty(groups * kernels.blocks_of(count) * kernels.KEYS * d)
        apart = query.new_empty(groups * count * columns if columns != d else 0)
        if isinstance(visible, Tensor):
            seen = visible.expand(rows, heads, n, count)
            kind, mask = kernels.MASK, [seen.data_ptr(), *seen.stride()[:3]]
        elif visible is not None:
            kind = kernels.LOWER if visible is Triangle.LOWER else kernels.UPPER
        for x in (asking, keys, values):
            given += [x, *x.stride()[:3]]
        given += [count, kind, *mask, turned, apart]
    numbers = given_to(*given)
    in_every_thread(kernels.turn_keys.address)(numbers, threads)
    in_every_thread(kernels.attend_blocks.address)(numbers, threads)
    return out


def _is_whole(x: Tensor) -> bool:
    return (x.dtype, x.device.type, x.stride(3)) == (torch.float32, "cpu", 1)


def _is_seen(visible: Tensor | Triangle | None, shape: tuple[int, ...]) -> bool:
    """Whether something tells of so many rows, heads, queries and keys what is seen."""
    if isinstance(visible, Triangle):
        return shape[2] == shape[3]
    return visible is None or (
        (visible.dtype, visible.device.type, visible.stride(-1)) == (torch.bool, "cpu", 1)
        and visible.shape[-1] == shape[3]
        and all(size in (1, whole) for size, whole in zip(visible.shape, shape, strict=True))
    )
