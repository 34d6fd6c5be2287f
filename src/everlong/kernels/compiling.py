"""How kernels are compiled, and what all of them are made of; imported only where Numba is installed.

What Numba keeps of a kernel it takes for outdated by the kernel's own file alone. So these name the hash of
this one and of `tiles`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract"},  # sums in any order; but what is not a number stays that
    "error_model": "numpy",  # as PyTorch divides by zero
}
inner = njit(**_OPTIONS)


def kernel(function: Any) -> Any:
    """Compile a kernel, and keep it for other processes where there is a place for it."""
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder that can be written to
        return cfunc(signature, **_OPTIONS)(function)


f32, u32 = np.float32, np.uint32

HAS_WIDE_VECTORS = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2]
"""Whether a vector of the processor that Numba compiles for has 16 numbers of 32 bits."""


def _pointer(kind: Any) -> Any:
    """Return what makes a pointer to numbers of some kind of an address."""
    pointer = types.CPointer(kind)

    @intrinsic
    def made(_context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), code

    return made


floats_at, halves_at, longs_at, ints_at, shorts_at, bytes_at = map(
    _pointer, (types.float32, types.uint16, types.int64, types.int32, types.int16, types.int8)
)


def plus_product(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """Return total + one · other: in one instruction, where the processor has it."""
    flags = ("contract",)
    return builder.fadd(builder.fmul(one, other, flags=flags), total, flags=flags)


@intrinsic
def fetch(_context: Any, address: Any) -> Any:
    """Ask for what lies at an address, before it is read."""

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        to_read, into_all_caches, of_data = (ir.Constant(number, value) for value in (0, 3, 1))
        where = builder.inttoptr(arguments[0], pointer)
        builder.call(fetch, [where, to_read, into_all_caches, of_data])
        return context.get_dummy_value()

    return types.void(types.int64), code


@intrinsic
def answer_of(_context: Any, address: Any) -> Any:
    """Call the C function at an address, which takes nothing and returns an int."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), []).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], function), [])

    return types.int32(types.int64), code


@inner
def number_of(bits):
    """Return the number whose bits, as of float64, a whole number has."""
    return f32(np.int64(bits).view(np.float64))


@inner
def rounded(x):
    """Return the bits of the bfloat16 number that is nearest, of two the even one."""
    bits = f32(x).view(u32)
    nearest = u32(bits + u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1))) >> u32(16)
    return np.uint16(0x7FC0) if (bits & u32(0x7FFFFFFF)) > u32(0x7F800000) else np.uint16(nearest)


@inner
def widened(half):
    """Return a bfloat16 number, given as its bits."""
    return u32(u32(half) << u32(16)).view(f32)


@inner
def exp(x):
    """Return e to the x, to about 1e-7 of it: e to the rest of x / log 2, a polynomial, times 2 to its floor.

    The coefficients are Cephes' (expf).
    """
    x = f32(-87) if x < f32(-87) else x
    x = f32(88) if x > f32(88) else x
    whole = np.floor(x * f32(1.44269504) + f32(0.5))
    rest = x - whole * f32(0.693359375) + whole * f32(2.12194440e-4)
    y = f32(1.9875691500e-4)
    y = y * rest + f32(1.3981999507e-3)
    y = y * rest + f32(8.3334519073e-3)
    y = y * rest + f32(4.1665795894e-2)
    y = y * rest + f32(1.6666665459e-1)
    y = y * rest + f32(5.0000001201e-1)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(f32)
    return (y * rest * rest + rest + f32(1)) * power
