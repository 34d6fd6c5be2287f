"""Attention of a few queries to many keys on a CPU: two products, each of which reads its numbers once.

PyTorch's flash kernel lets every head read the keys by itself, also where several heads share them: that is
most of what it costs to write a token. Products over key-value heads read them once, if they are put as MKL
has a fast kernel for them: on the processors that were tried, of AMD, that is keys times queries with AVX-512
or for large heads, and queries times keys otherwise.
"""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

_MOST_ROWS = 16  # queries of one key-value head
_LEAST = {"alone": 2**19, "spinning": 2**19, "sleeping": 2**22}
"""Products of numbers from which on this is faster, by how threads wait: three calls wake them, for one.
Tried on a CPU of two cores with AVX-512, with one thread and with two, in recorded steps."""
_LEAST_RUN = 256  # keys of a piece
_SMALL_HEAD = 64
"""Numbers up to which queries times keys are the faster with AVX2: tried were 64, 128 and 256."""


def pays(queries: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attend_few` takes tensors like these, and is the faster way.

    Parameters
    ----------
    queries : Tensor
        Shape (batch, heads, n, d).
    keys, values : Tensor
        Shape (batch, key-value heads, m, d); nothing needs a gradient.
    """
    batch, heads, n, size = queries.shape
    kv_heads, m = keys.shape[1:3]
    return (
        batch * heads * n * m * size >= _LEAST[_waiting()]
        and heads // kv_heads * n <= _MOST_ROWS
        and queries.dtype == keys.dtype == values.dtype == torch.float32
        and queries.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and all(batch == 1 or x.stride(0) == kv_heads * x.stride(1) for x in (keys, values))
    )


def attend_few(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend to keys all of which every query sees; parameters as of :func:`pays`.

    Returns
    -------
    Tensor
        Shape (batch, heads, n, d).
    """
    batch, heads, n, size = queries.shape
    asking = queries.reshape(batch * keys.shape[1], -1, size)
    attend = _keys_by_queries if size > _SMALL_HEAD or _has_avx512() else _queries_by_keys
    return attend(asking, keys, values, scaling).view(batch, heads, n, -1)


def _queries_by_keys(asking: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend; `asking` has shape (batch · key-value heads, rows, d), as has what is returned.

    Keys are not cut: where that was tried, putting the pieces together took what equal shares saved.
    """
    keys, values = keys.flatten(0, 1), values.flatten(0, 1)
    weights = torch.softmax(torch.bmm(asking * scaling, keys.transpose(1, 2)), -1)
    return torch.bmm(weights, values)


def _keys_by_queries(asking: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Attend; the keys of each head are cut where threads would have unequal shares."""
    (groups, rows, size), m, pieces = asking.shape, keys.shape[2], _pieces(keys, values)
    keys, values = (_cut(x, pieces) for x in (keys, values))
    asking = asking.unsqueeze(1).expand(-1, pieces, -1, -1) * scaling
    asking = asking.reshape(groups * pieces, rows, size)
    logits = torch.bmm(keys, asking.transpose(1, 2)).view(groups, m, rows)
    weights = torch.softmax(logits.transpose(1, 2), -1)
    if pieces > 1:
        weights = weights.view(groups, rows, pieces, -1).transpose(1, 2).reshape(groups * pieces, rows, -1)
    output = torch.bmm(weights, values)
    return output if pieces == 1 else output.view(groups, pieces, rows, -1).sum(1)


def _pieces(keys: Tensor, values: Tensor) -> int:
    """Return into how many runs the keys of each head are cut, so that threads have equal shares, about."""
    threads, m = torch.get_num_threads(), keys.shape[2]
    if any(x.stride(1) != m * x.stride(2) for x in (keys, values)):
        return 1
    wanted = threads // math.gcd(threads, keys.shape[0] * keys.shape[1])
    runs = range(min(wanted, m // _LEAST_RUN), 0, -1)
    return next((pieces for pieces in runs if m % pieces == 0), 1)


def _cut(x: Tensor, pieces: int) -> Tensor:
    """Return a view of `x`, shape (batch, heads, m, d), as (batch · heads · pieces, m / pieces, d)."""
    flat = x.flatten(0, 1)
    return flat if pieces == 1 else flat.view(len(flat) * pieces, -1, x.shape[3])


@functools.cache
def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


@functools.cache
def _sleeps() -> bool:
    """Whether OpenMP's threads sleep as soon as they have nothing to do."""
    turns = os.environ.get("GOMP_SPINCOUNT")  # has the last word
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" if turns is None else turns == "0"


def _waiting() -> str:
    if torch.get_num_threads() == 1:
        return "alone"
    return "sleeping" if _sleeps() else "spinning"
