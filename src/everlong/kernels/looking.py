"""The kernel that looks at keys, in the part of Python that Numba compiles; given as those of `compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from everlong.kernels.compiling import (
    HAS_WIDE_VECTORS,
    answer_of,
    f32,
    floats_at,
    inner,
    ints_at,
    kernel,
    longs_at,
    shorts_at,
)
from everlong.kernels.tiles import TILE

_MADE_OF = "106b627f519cf9eb"  # of compiling.py and tiles.py: when they change, what Numba keeps is outdated

LOOKED = 256
"""Keys that a thread looks at before it seeks the largest products."""

TOGETHER = 6
"""Of those that ask, how many are multiplied with codes at once: their sums stay in the processor."""

_WIDTH = TILE if HAS_WIDE_VECTORS else TILE // 2  # keys multiplied at once
_STRIDE = LOOKED + TILE  # of products: whole tiles, wherever the first token stands in its own
_TINY, _STEPS, _SMALLEST = f32(np.finfo(np.float32).tiny), f32(32767), np.int32(-(2**31))


def room(c: int, d: int) -> int:
    """Return how many numbers of 32 bits a thread writes to, where c ask in d channels."""
    many = (c + TOGETHER - 1) // TOGETHER * TOGETHER
    return 4 * d + 2 * c + many * ((d + 1) // 2 + _STRIDE)


_room = inner(room)


@intrinsic
def _multiply(_context: Any, codes: Any, asked: Any, pairs: Any, products: Any, stride: Any) -> Any:
    """Multiply the codes of `_WIDTH` tokens in a tile with `TOGETHER` that ask.

    Given where the codes lie, (pairs, TILE, 2) int8; where what asks does, (TOGETHER, pairs, 2) int16; the
    pairs; and where to write whole numbers of 32 bits, as many as `stride` from one that asks to the next.
    Written as vectors, of which LLVM makes what the processor has: on x86 a product of pairs and their sum is
    one instruction (vpmaddwd), and with VNNI so is what adds it up.
    """
    byte, short, number, long = (ir.IntType(bits) for bits in (8, 16, 32, 64))
    sums, both = ir.VectorType(number, _WIDTH), ir.VectorType(number, 2 * _WIDTH)
    nought = ir.Constant(sums, [0] * _WIDTH)
    firsts, seconds = (ir.Constant(sums, list(range(at, 2 * _WIDTH, 2))) for at in (0, 1))

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        codes, asked, pairs, products, stride = arguments
        codes, asked = (
            builder.inttoptr(codes, byte.as_pointer()),
            builder.inttoptr(asked, number.as_pointer()),
        )
        products = builder.inttoptr(products, number.as_pointer())
        totals = [cgutils.alloca_once_value(builder, nought) for _ in range(TOGETHER)]
        with cgutils.for_range(builder, pairs) as loop:
            at = builder.gep(codes, [builder.mul(loop.index, ir.Constant(long, 2 * TILE))])
            at = builder.bitcast(at, ir.VectorType(byte, 2 * _WIDTH).as_pointer())
            some = builder.sext(builder.load(at, align=1), both)
            for one, total in enumerate(totals):
                place = builder.add(builder.mul(pairs, ir.Constant(long, one)), loop.index)
                pair = builder.load(builder.gep(asked, [place]), align=2)
                pair = builder.insert_element(ir.Constant(sums, ir.Undefined), pair, ir.Constant(number, 0))
                pair = builder.shuffle_vector(pair, pair, nought)
                pair = builder.sext(builder.bitcast(pair, ir.VectorType(short, 2 * _WIDTH)), both)
                each = builder.mul(some, pair)
                halves = (builder.shuffle_vector(each, each, part) for part in (firsts, seconds))
                builder.store(builder.add(builder.load(total), builder.add(*halves)), total)
        for one, total in enumerate(totals):
            at = builder.gep(products, [builder.mul(stride, ir.Constant(long, one))])
            builder.store(builder.load(total), builder.bitcast(at, sums.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), code


@inner
def _of_codes(asked, many, pairs, codes, tiles, products, stride):
    """Write products of tiles of codes at an address with what asks, (many, pairs, 2) int16, at another."""
    for tile in range(tiles):
        for one in range(0, many, TOGETHER):
            for k in range(0, TILE, _WIDTH):
                at, into = (
                    codes + 2 * (TILE * pairs * tile + k),
                    products + 4 * (stride * one + TILE * tile + k),
                )
                _multiply(at, asked + 4 * pairs * one, pairs, into, stride)


@inner
def _of_keys(asked, at, count, rows, output):
    """Write the products of what asks, (c, d), with `count` keys at an address, as (c, count).

    Four at a time, whatever their number, so that the same key gives the same number wherever it stands;
    `rows`, (4, d), is where they are copied to, and behind the last product there is room for three.
    """
    d = asked.shape[1]
    keys = carray(floats_at(at), (count, d))
    for k in range(0, count, 4):
        for j in range(4):
            here = min(k + j, count - 1)
            for i in range(d):
                rows[j, i] = keys[here, i]
        for one in range(len(asked)):
            s0, s1, s2, s3 = f32(0), f32(0), f32(0), f32(0)
            for i in range(d):
                x = asked[one, i]
                s0 += x * rows[0, i]
                s1 += x * rows[1, i]
                s2 += x * rows[2, i]
                s3 += x * rows[3, i]
            output[one, k], output[one, k + 1] = s0, s1
            output[one, k + 2], output[one, k + 3] = s2, s3


@inner
def _prepare(asked, scale, center, whole, steps, shifts):
    """Write what asks, (c, d), in 16 bits, as codes are multiplied with it, its steps, and what is added."""
    c, d = asked.shape
    for i in range(c):
        shift, most = f32(0), _TINY
        for j in range(d):
            shift += asked[i, j] * center[j]
            size = abs(asked[i, j] * scale[j])
            most = size if size > most else most
        steps[i], shifts[i] = most / _STEPS, shift
        for j in range(d):
            whole[i, j] = np.int16(np.rint(asked[i, j] * scale[j] / most * _STEPS))


@inner
def _raise_maxima(products, least, steps, shifts, skipped, count, at, block, found):
    """Raise the maxima of blocks, (c, blocks), to the products of tokens that are the `at`-th and on.

    They are the `count` after as many as are `skipped`; none is below the `least`; each is meant times the
    step of what asks, plus its shift.
    """
    k = 0
    while k < count:
        number = (at + k) // block
        stop = min(count, (number + 1) * block - at)
        for one in range(len(found)):
            largest = least
            for j in range(np.uint64(skipped + k), np.uint64(skipped + stop)):
                product = products[np.uint64(one), j]
                largest = product if product > largest else largest
            meant = f32(largest) * steps[one] + shifts[one]
            found[one, number] = meant if meant > found[one, number] else found[one, number]
        k = stop


@kernel
def look(given):
    """Raise the maxima of a thread's share of blocks to the products of what asks with their keys.

    Keys are in segments; codes lie in tiles, and a key is center + scale · code in each dimension, both of
    its segment. Run by every thread. Given: what asks, (heads, c, d); where the keys or codes of each segment
    lie, and the stride of its heads in numbers; scales and centers, (segments, heads, d), or 0 and 0: they
    are no codes; the maxima, (heads, c, blocks); a place for each thread, as large as `room` says; what to
    ask for its number, and how many they are; segments, heads, c, d, blocks, tokens of a block and of a
    segment; the token that the first segment begins with, the one that the first block begins with, and the
    tokens looked at, from one to before another, all of which are in the segments.
    """
    a = carray(given, (20,))
    segments, heads, c, d, blocks, block, segment = a[9], a[10], a[11], a[12], a[13], a[14], a[15]
    first, begin, low, high = a[16], a[17], a[18], a[19]
    thread, threads = answer_of(a[7]), answer_of(a[8])
    are_codes = a[3] != 0
    places, strides = carray(longs_at(a[1]), (segments,)), carray(longs_at(a[2]), (segments,))
    many, pairs = (c + TOGETHER - 1) // TOGETHER * TOGETHER, (d + 1) // 2
    at = a[6] + 4 * thread * _room(c, d)
    rows, steps = carray(floats_at(at), (4, d)), carray(floats_at(at + 16 * d), (c,))
    shifts, whole_at = carray(floats_at(at + 16 * d + 4 * c), (c,)), at + 16 * d + 8 * c
    whole, products_at = carray(shorts_at(whole_at), (many, 2 * pairs)), whole_at + 4 * many * pairs
    of_keys = carray(floats_at(products_at), (many, _STRIDE))
    of_codes = carray(ints_at(products_at), (many, _STRIDE))
    whole[:], steps[:], shifts[:] = 0, 1, 0
    since = (low - begin) // block
    looked = heads * ((high - begin + block - 1) // block - since)
    one, last, prepared = thread * looked // threads, (thread + 1) * looked // threads, -1
    while one < last:
        head, number = one // (looked // heads), one % (looked // heads)
        some = min(last - one, looked // heads - number)
        one += some
        asked = carray(floats_at(a[0] + 4 * head * c * d), (c, d))
        found = carray(floats_at(a[5] + 4 * head * c * blocks), (c, blocks))
        token = max(low, begin + (since + number) * block)
        stop = min(high, begin + (since + number + some) * block)
        while token < stop:
            place = token // segment - first // segment
            count = min(stop - token, LOOKED, segment - token % segment)
            start = max(first, token // segment * segment)
            at = head * strides[place]
            if are_codes:
                group, skipped = place * heads + head, token % TILE
                if group != prepared:
                    scale = carray(floats_at(a[3] + 4 * group * d), (d,))
                    center = carray(floats_at(a[4] + 4 * group * d), (d,))
                    _prepare(asked, scale, center, whole, steps, shifts)
                    prepared = group
                at += places[place] + 2 * pairs * (token - skipped - start // TILE * TILE)
                tiles = (skipped + count + TILE - 1) // TILE
                _of_codes(whole_at, many, pairs, at, tiles, products_at, _STRIDE)
                _raise_maxima(of_codes, _SMALLEST, steps, shifts, skipped, count, token - begin, block, found)
            else:
                at = places[place] + 4 * (at + (token - start) * d)
                _of_keys(asked, at, count, rows, of_keys)
                _raise_maxima(of_keys, -f32(np.inf), steps, shifts, 0, count, token - begin, block, found)
            token += count
