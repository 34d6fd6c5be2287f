"""The kernels as functions of tensors, which a tape records as it records PyTorch's own.

Each returns a new tensor, or writes `out`. Tensors are of float32 numbers on a CPU, and contiguous where
nothing else is said; :func:`fit` says whether they are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from everlong.kernels.loading import compiled
from everlong.kernels.team import has_team, in_every_thread

Repeated = Callable[[], Any]


class KernelFunction:
    """A kernel, as a function of tensors.

    Parameters
    ----------
    prepared : callable
        Called as `prepared(*args, out)`; returns what writes `out`, from where the tensors lie now.
    new : callable
        Called as `new(*args)`; returns memory for the output.
    writes : tuple of int
        Arguments that it writes to, besides.
    """

    def __init__(
        self, prepared: Callable[..., Repeated], new: Callable[..., Tensor], writes: tuple[int, ...] = ()
    ) -> None:
        self.__name__ = prepared.__name__.strip("_")
        self.__doc__ = prepared.__doc__
        self.writes = writes
        self._prepared = prepared
        self._new = new

    def __call__(self, *args: Any, out: Tensor | None = None) -> Tensor:
        """Compute."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        if has_torch_function(tensors):
            named = {} if out is None else {"out": out}
            recorded: Tensor = handle_torch_function(self, tensors, *args, **named)
            return recorded
        out = self._new(*args) if out is None else out
        self._prepared(*args, out)()
        return out

    def repeated(self, *args: Any, out: Tensor) -> Repeated:
        """Return what computes it again, of what stands in the same memory then; it holds on to that."""
        call = self._prepared(*args, out)
        held = args, out

        def repeat(held: Any = held, call: Repeated = call) -> None:
            call()

        return repeat


def fit(*tensors: Tensor) -> bool:
    """Whether tensors are of float32 numbers on a CPU, each contiguous."""
    return all(x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() for x in tensors)


def window_fits(keys: Tensor, values: Tensor) -> bool:
    """Whether a window lies as :func:`turn_and_put` and :func:`attend` take it."""
    _, heads, _, d = keys.shape
    return keys.stride() == values.stride() and all(
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.stride()[2:] == (d, 1)
        and (len(x) == 1 or x.stride(0) == heads * x.stride(1))
        for x in (keys, values)
    )


def attends(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attend` takes these: one query a row, a window that fits, and threads to run in."""
    alike = query.shape[2] == 1 and fit(query) and keys.shape == values.shape
    return alike and window_fits(keys, values) and has_team()


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, plus: float, dtype: torch.dtype, out: Tensor
) -> Repeated:
    """Norm rows by their root mean square.

    Parameters
    ----------
    x : Tensor
        Shape (rows, d).
    weight : Tensor
        Shape (d,).
    eps : float
        Added to the mean square.
    plus : float
        Added to the weight.
    dtype : torch.dtype
        The output's: float32 or bfloat16.
    """
    return _call("rms_norm", x, weight, out, *x.shape, float(eps), float(plus), dtype == torch.bfloat16)


def _gated(gates_and_ups: Tensor, slope: float, cube: float, out: Tensor) -> Repeated:
    """Return x · sigmoid(slope · (x + cube · x³)) · up: SiLU, and GELU by tanh, times what they gate.

    Parameters
    ----------
    gates_and_ups : Tensor
        bfloat16, shape (rows, 2 n): gates x, then ups.
    """
    rows, n = gates_and_ups.shape
    return _call("gated", gates_and_ups, out, rows, n // 2, float(slope), float(cube))


def _turn_and_put(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    sinks: Tensor | None,
    out: Tensor,
) -> Repeated:
    """Rotate a token's queries and keys, and put its keys and values, and rotated sinks, into a window.

    Parameters
    ----------
    query, key, value : Tensor
        Raw, shape (rows, heads, 1, d) and (rows, key-value heads, 1, d); rows may lie apart.
    cos, sin : Tensor
        Shape (1, r), as :func:`~everlong.models.rotary.rotate` takes them for pairs in halves.
    slot : Tensor
        int64, shape (1,).
    keys, values : Tensor
        The window, shape (rows, key-value heads, slots, d); heads may lie apart, all alike.
    sinks : Tensor or None
        Shape (rows, key-value heads, sinks, d), for the first slots.

    Returns
    -------
    Tensor
        The rotated queries, shape (rows, heads, 1, d).
    """
    rows, heads, _, d = query.shape
    return _call(
        "turn_and_put",
        *(query, key, value),
        *(x.stride(0) for x in (query, key, value)),
        *(cos, sin, slot, keys, values, keys.stride(1)),
        *(0 if sinks is None else sinks, out),
        *(rows, heads, key.shape[1], d, cos.shape[-1], 0 if sinks is None else sinks.shape[2]),
    )


def _attend(query: Tensor, keys: Tensor, values: Tensor, scaling: float, out: Tensor) -> Repeated:
    """Attend to all keys, with one query a row and head, in as many threads as PyTorch has.

    Parameters
    ----------
    query : Tensor
        Shape (rows, heads, 1, d).
    keys, values : Tensor
        Shape (rows, key-value heads, m, d); heads may lie apart, all alike.
    scaling : float
        Factor on the products.

    Returns
    -------
    Tensor
        Shape (rows, heads, 1, d).
    """
    (rows, kv_heads, m, d), threads, run = keys.shape, torch.get_num_threads(), compiled().RUN
    groups, g = rows * kv_heads, query.shape[1] // kv_heads
    partial_sums = torch.empty(groups, -(-m // run), g, d + 2)
    logits = torch.empty(threads, g, run)
    given = _given(
        *(query, keys, values, partial_sums, logits, out),
        *(groups, g, d, m, keys.stride(1), float(scaling)),
    )
    attend = in_every_thread(compiled().attend_runs.address)
    merge = _function("merge_runs")
    assert attend is not None

    def repeat(held: Any = (partial_sums, logits)) -> None:
        attend(given, min(threads, torch.get_num_threads()))
        merge(given)

    return repeat


rms_norm = KernelFunction(_rms_norm, lambda x, weight, eps, plus, dtype: torch.empty_like(x, dtype=dtype))
gated = KernelFunction(_gated, lambda x, *_: x.new_empty(len(x), x.shape[1] // 2))
turn_and_put = KernelFunction(_turn_and_put, lambda query, *_: torch.empty(query.shape), writes=(6, 7))
attend = KernelFunction(_attend, lambda query, *_: torch.empty(query.shape))


def _call(name: str, *values: Tensor | float) -> Repeated:
    return partial(_function(name), _given(*values))


def _given(*values: Tensor | float) -> Any:
    """Return what a kernel is given: where tensors lie, whole numbers, and the bits of others."""
    numbers = map(_as_whole, values)
    return (ctypes.c_int64 * len(values))(*numbers)


def _as_whole(value: Tensor | float) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return int(bits)
    return int(value)


@cache
def _function(name: str) -> Callable[[Any], None]:
    """Return a kernel that is run in one thread: it is over sooner than another could take the lock."""
    return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(getattr(compiled(), name).address)
