"""The kernel that rotates the heads of many tokens, as in reading; given as those of `compiled`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from everlong.kernels.compiling import answer_of, floats_at, kernel, plus_product
from everlong.kernels.tiles import PAIRS

_MADE_OF = "106b627f519cf9eb"  # of compiling.py and tiles.py: when they change, what Numba keeps is outdated

_number, _long = ir.FloatType(), ir.IntType(64)


@intrinsic
def _turn(_context, x, cos, sin, output, middle):
    """Rotate pairs of numbers, `middle` apart: where they, their cos and sin are, and where to write them."""
    some = ir.VectorType(_number, PAIRS)

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        middle = arguments[4]
        x, cos, sin, output = (builder.inttoptr(each, _number.as_pointer()) for each in arguments[:4])
        with cgutils.for_range(builder, builder.udiv(middle, ir.Constant(_long, PAIRS))) as loop:
            first = builder.mul(loop.index, ir.Constant(_long, PAIRS))
            both = first, builder.add(first, middle)

            def at(pointer: Any, place: Any) -> Any:
                return builder.bitcast(builder.gep(pointer, [place]), some.as_pointer())

            halves = [builder.load(at(x, place), align=4) for place in both]
            for place, own, other in zip(both, halves, halves[::-1], strict=True):
                turned = builder.fmul(own, builder.load(at(cos, place), align=4))
                turned = plus_product(builder, turned, other, builder.load(at(sin, place), align=4))
                builder.store(turned, at(output, place), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), code


@kernel
def turn(given):
    """Rotate a thread's share of the heads of many tokens; run by every thread.

    Given: x, (rows, heads, n, d), cos, sin, output, of that shape and in one piece; what to ask for a
    thread's number, and how many they are; rows, heads, n, d, and how many of these are rotated; how many
    numbers of x are from one row, head and token to the next, and of cos and of sin from one row and token.
    """
    a = carray(given, (18,))
    thread, threads = answer_of(a[4]), answer_of(a[5])
    rows, heads, n, d, width = a[6], a[7], a[8], a[9], a[10]
    tasks = rows * n
    for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
        row, token = task // n, task % n
        cos, sin = a[1] + 4 * (row * a[14] + token * a[15]), a[2] + 4 * (row * a[16] + token * a[17])
        for head in range(heads):
            x = a[0] + 4 * (row * a[11] + head * a[12] + token * a[13])
            output = a[3] + 4 * ((row * heads + head) * n + token) * d
            _turn(x, cos, sin, output, width // 2)
            if width < d:
                rest = carray(floats_at(output + 4 * width), (d - width,))
                still = carray(floats_at(x + 4 * width), (d - width,))
                for i in range(d - width):
                    rest[i] = still[i]
