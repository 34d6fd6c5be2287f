"""The kernels as functions of tensors, which a tape records as it records PyTorch's own.

Each returns a new tensor, or writes `out`. Tensors are of float32 numbers on a CPU and contiguous, where
nothing else is said; :func:`fit` and its neighbours say whether they are.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from everlong.errors import StateError
from everlong.kernels.loading import compiled
from everlong.kernels.team import asking_addresses, has_team, in_every_thread

Prepared = tuple[Callable[[Any], object], Any]
"""What runs a kernel, and what it is given: whole numbers, of which the first are where its tensors lie."""


class KernelFunction:
    """A kernel, as a function of tensors, which are the first of its arguments, and of what it is given.

    Parameters
    ----------
    prepare : callable
        Called as `prepare(*args, out)`; returns what writes `out`, from where the tensors lie now.
    new : callable
        Called as `new(*args)`; returns memory for the output.
    writes : tuple of int
        Arguments that it writes to, besides, where they are tensors.
    """

    def __init__(
        self, prepare: Callable[..., Prepared], new: Callable[..., Tensor], writes: tuple[int, ...] = ()
    ) -> None:
        self.__name__ = prepare.__name__.strip("_")
        self.__doc__ = prepare.__doc__
        self.writes = writes
        self._prepare = prepare
        self._new = new

    def __call__(self, *args: Any, out: Tensor | None = None) -> Tensor:
        """Run the kernel now, or let a tape that is open do it."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        if has_torch_function(tensors):
            named = {} if out is None else {"out": out}
            recorded: Tensor = handle_torch_function(self, tensors, *args, **named)
            return recorded
        out = self._new(*args) if out is None else out
        run, given = self._prepare(*args, out)
        run(given)
        return out

    def repeated(self, *args: Any, out: Tensor) -> Callable[[], None]:
        """Return what computes it again, of the numbers that stand in the same memory then.

        It holds on to that memory, wherever its tensors are moved meanwhile.
        """
        run, given = self._prepare(*args, out)
        memory = _memory(*args, out)

        def repeat(memory: list[Tensor] = memory) -> None:  # held by being a default
            run(given)

        return repeat

    def repeated_of(
        self, made: Callable[[], Tensor], place: int, *args: Any, out: Tensor
    ) -> Callable[[], None]:
        """Return the same, with one of its tensors made anew each time, alike in all but where it lies."""
        run, given = self._prepare(*args, out)
        memory = _memory(*args, out)

        def repeat(memory: list[Tensor] = memory) -> None:
            x = made()
            given[place] = x.data_ptr()
            run(given)

        return repeat


class Scratch:
    """Memory that the kernels of one step use one after the other."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int], Tensor] = {}

    def of(self, name: str, numbers: int) -> Tensor:
        """Return memory for so many numbers of one purpose, the same each time."""
        if (name, numbers) not in self._held:
            self._held[name, numbers] = torch.empty(numbers, dtype=torch.float32, device="cpu")
        return self._held[name, numbers]


def fit(*tensors: Tensor) -> bool:
    """Whether tensors are of float32 numbers on a CPU, each contiguous."""
    return all(x.is_contiguous() and _is_plain(x) for x in tensors)


def window_fits(keys: Tensor, values: Tensor) -> bool:
    """Whether a window lies as :func:`turn_and_put` and :func:`attend` take it."""
    _, heads, slots, d = keys.shape
    return (
        slots > 0
        and keys.shape == values.shape
        and keys.stride() == values.stride()
        and keys.stride()[2:] == (d, 1)
        and (len(keys) == 1 or keys.stride(0) == heads * keys.stride(1))
        and _is_plain(keys)
        and _is_plain(values)
    )


def token_fits(query: Tensor, key: Tensor, value: Tensor, keys: Tensor) -> bool:
    """Whether one token a row, raw, is of such a window: its heads lie together, its rows may lie apart."""
    rows, kv_heads, _, d = keys.shape
    return (
        key.shape == value.shape == (rows, kv_heads, 1, d)
        and query.shape == (rows, query.shape[1], 1, d)
        and query.shape[1] % kv_heads == 0
        and fit(*(x[0] for x in (query, key, value)))
    )


def attends(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether :func:`attend` takes these: one query a row, a window that fits, and threads to run in."""
    rows, kv_heads, _, d = keys.shape
    is_of = query.shape == (rows, query.shape[1], 1, d) and query.shape[1] % kv_heads == 0
    return is_of and fit(query) and window_fits(keys, values) and has_team()


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, plus: float, dtype: torch.dtype, out: Tensor
) -> Prepared:
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

    Returns
    -------
    Tensor
        Shape (rows, d).
    """
    require(fit(x, weight) and weight.shape == x.shape[1:] and dtype in _NORMED, "rms_norm")
    is_half = dtype == torch.bfloat16
    return function("rms_norm"), given_to(x, weight, out, *x.shape, float(eps), float(plus), is_half)


def _gated(gates_and_ups: Tensor, slope: float, cube: float, out: Tensor) -> Prepared:
    """Return x · sigmoid(slope · (x + cube · x³)) · up: SiLU, and GELU by tanh, times what they gate.

    Parameters
    ----------
    gates_and_ups : Tensor
        bfloat16, shape (rows, 2 n): gates x, then ups.
    slope, cube : float
        1 and 0 for SiLU, √(8/π) and 0.044715 for GELU.

    Returns
    -------
    Tensor
        bfloat16, shape (rows, n).
    """
    x = gates_and_ups
    rows, n = x.shape[0], x.shape[1] // 2
    require(x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] == 2 * n, "gated")
    return function("gated"), given_to(x, out, rows, n, float(slope), float(cube))


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
    raw: Tensor | None,
    out: Tensor,
) -> Prepared:
    """Rotate a token's queries and keys, and put its keys and values, and rotated sinks, into a window.

    Parameters
    ----------
    query, key, value : Tensor
        Raw, shape (rows, heads, 1, d) and (rows, key-value heads, 1, d); rows may lie apart.
    cos, sin : Tensor
        Shape (1, r), as :func:`~everlong.models.rotary.rotate` takes them for pairs in halves.
    slot : Tensor
        int64, shape (1,): one that the window has.
    keys, values : Tensor
        The window, shape (rows, key-value heads, slots, d); heads may lie apart, all alike.
    sinks : Tensor or None
        Shape (rows, key-value heads, sinks, d), for the first slots.
    raw : Tensor or None
        Where the window's keys stand unrotated, too; it lies as they do.

    Returns
    -------
    Tensor
        The rotated queries, shape (rows, heads, 1, d).
    """
    (rows, kv_heads, _, d), count = keys.shape, 0 if sinks is None else sinks.shape[2]
    require(
        window_fits(keys, values)
        and token_fits(query, key, value, keys)
        and fit(cos, sin)
        and cos.shape == sin.shape == (1, cos.shape[-1])
        and cos.shape[-1] <= d
        and _is_whole_number(slot)
        and (sinks is None or (fit(sinks) and sinks.shape == (rows, kv_heads, count, d)))
        and (raw is None or window_fits(raw, keys)),
        "turn_and_put",
    )
    return function("turn_and_put"), given_to(
        *(query, key, value, cos, sin, slot, keys, values),
        *(0 if x is None else x for x in (sinks, raw)),
        out,
        *(x.stride(0) for x in (query, key, value)),
        *(keys.stride(1), rows, query.shape[1], kv_heads, d, cos.shape[-1], count, 0, 0, 0),
    )


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, count: Tensor, scaling: float, scratch: Scratch, out: Tensor
) -> Prepared:
    """Attend to the first keys, with one query a row and head, in as many threads as PyTorch has.

    Parameters
    ----------
    query : Tensor
        Shape (rows, heads, 1, d).
    keys, values : Tensor
        Shape (rows, key-value heads, m, d); heads may lie apart, all alike.
    count : Tensor
        int64, shape (1,): how many keys are seen, from 1 to m, whenever it is run.
    scaling : float
        Factor on the products.
    scratch : Scratch
        Memory for what comes between.

    Returns
    -------
    Tensor
        Shape (rows, heads, 1, d).
    """
    require(attends(query, keys, values) and _is_whole_number(count), "attend")
    (rows, kv_heads, m, d), threads, run = keys.shape, torch.get_num_threads(), compiled().RUN
    groups, g = rows * kv_heads, query.shape[1] // kv_heads
    sums = scratch.of("sums", groups * -(-m // run) * g * (d + 2))
    logits = scratch.of("logits", threads * g * run)
    given = given_to(
        *(query, keys, values, count, keys.stride(1), out, sums, logits, *asking_addresses()),
        *(groups, g, d, float(scaling), 0),
    )
    attend, merge = in_every_thread(compiled().attend_runs.address), function("merge_runs")

    def run_both(given: Any, memory: Any = (sums, logits)) -> None:  # held by being a default
        attend(given, min(threads, torch.get_num_threads()))
        merge(given)

    return run_both, given


_NORMED = (torch.float32, torch.bfloat16)

rms_norm = KernelFunction(_rms_norm, lambda x, weight, eps, plus, dtype: torch.empty_like(x, dtype=dtype))
gated = KernelFunction(_gated, lambda x, *_: x.new_empty(len(x), x.shape[1] // 2))
turn_and_put = KernelFunction(_turn_and_put, lambda query, *_: query.new_empty(query.shape), writes=(6, 7, 9))
attend = KernelFunction(_attend, lambda query, *_: query.new_empty(query.shape))


def require(holds: bool, name: str) -> None:
    """Refuse what a kernel, which goes by addresses, would read or write elsewhere."""
    if not holds:
        raise StateError(f"the kernel {name} does not take tensors that lie like these")


def _is_whole_number(x: Tensor) -> bool:
    return (x.dtype, x.shape, x.device.type) == (torch.int64, (1,), "cpu")


def _is_plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu"


def _memory(*values: Any) -> list[Tensor]:
    """Return what holds on to the memory of tensors as it is now."""
    return [x.detach() for x in values if isinstance(x, Tensor)]


def given_to(*values: Tensor | float) -> Any:
    """Return what a kernel is given: where tensors lie, whole numbers, and the bits of others."""
    return (ctypes.c_int64 * len(values))(*map(_as_whole, values))


def _as_whole(value: Tensor | float) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        (bits,) = struct.unpack("<q", struct.pack("<d", value))
        return int(bits)
    return int(value)


@cache
def function(name: str) -> Callable[[Any], object]:
    """Return a kernel that runs in one thread, and is over sooner than another could take Python's lock."""
    return ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(getattr(compiled(), name).address)
