"""The kernel that attends with many queries, as in reading: several parts under one softmax.

Keys are turned around, so that a vector has the same channel of keys that follow one another, and are
multiplied with a few queries at once: their sums stay in the processor, and each number that is read is
multiplied several times. The softmax is built up from block to block of keys, in powers of 2. What many
queries take lies between: vectors are written as such for LLVM, which makes of them what the processor has.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from everlong.kernels.compiling import (
    HAS_WIDE_VECTORS,
    answer_of,
    bytes_at,
    f32,
    floats_at,
    inner,
    kernel,
    number_of,
    plus_product,
)

_MADE_OF = "106b627f519cf9eb"  # of compiling.py and tiles.py: when they change, what Numba keeps is outdated

QUERIES, KEYS = 64, 128
"""Queries and keys of a block: what comes of their products fits into a processor's own cache."""

NUMBERS = 20
"""Numbers that :func:`attend_blocks` is given for each part."""

ALL, LOWER, UPPER, MASK = range(4)
"""What a part's queries see: all of its keys; those up to their own, or from it on; what a mask says."""

_WIDTH = 64 if HAS_WIDE_VECTORS else 16  # columns multiplied at once
_TOGETHER = 4  # rows
_HIDDEN, _LEAST = -1e30, -100.0  # a hidden key's logit, and what counts as the least: powers of 2
_LOG2E = f32(math.log2(math.e))
_TAYLOR = [math.log(2) ** k / math.factorial(k) for k in range(7)]  # of 2 to the x, for |x| up to a half

_float, _int, _long = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_vector, _whole = ir.VectorType(_float, _WIDTH), ir.VectorType(_int, _WIDTH)


# --- vectors -----------------------------------------------------------------------------------------


def _all_of(value: float, kind: Any = _vector) -> Any:
    return ir.Constant(kind, [value] * _WIDTH)


def _spread(builder: Any, value: Any) -> Any:
    """Return a vector of one number."""
    first = builder.insert_element(ir.Constant(_vector, ir.Undefined), value, ir.Constant(_int, 0))
    return builder.shuffle_vector(first, first, _all_of(0, _whole))


def _place(builder: Any, pointer: Any, *products: tuple[Any, Any]) -> Any:
    """Return the pointer to a number so many further on: the sum of products of whole numbers."""
    at = ir.Constant(_long, 0)
    for one, other in products:
        many = ir.Constant(_long, other) if isinstance(other, int) else other
        at = builder.add(at, builder.mul(one, many))
    return builder.gep(pointer, [at])


def _load(builder: Any, pointer: Any) -> Any:
    return builder.load(builder.bitcast(pointer, _vector.as_pointer()), align=4)


def _store(builder: Any, value: Any, pointer: Any) -> None:
    builder.store(value, builder.bitcast(pointer, _vector.as_pointer()), align=4)


def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def _power(builder: Any, x: Any) -> Any:
    """Return 2 to the x, a vector or a number up to 0, to about 1e-7 of it; at least 2 to the `_LEAST`."""
    is_vector = isinstance(x.type, ir.VectorType)
    kind, name = (_whole, f"v{_WIDTH}f32") if is_vector else (_int, "f32")

    def number(value: float, of: Any = x.type) -> Any:
        return _all_of(value, of) if is_vector else ir.Constant(of, value)

    is_less = builder.fcmp_ordered("<", x, number(_LEAST))
    x = builder.select(is_less, number(_LEAST), x)  # what is no number stays that
    rint = ir.FunctionType(x.type, [x.type])
    whole = builder.call(cgutils.get_or_insert_function(builder.module, rint, f"llvm.rint.{name}"), [x])
    rest, power = builder.fsub(x, whole), number(_TAYLOR[-1])
    for coefficient in _TAYLOR[-2::-1]:
        power = plus_product(builder, number(coefficient), power, rest)
    exponent = builder.shl(builder.fptosi(whole, kind), number(23, kind))
    return builder.bitcast(builder.add(builder.bitcast(power, kind), exponent), x.type)


def _largest_of(builder: Any, vector: Any) -> Any:
    """Return the largest number of a vector."""
    width = _WIDTH
    while width > 1:
        width //= 2
        halves = (range(width), range(width, 2 * width))
        masks = (ir.Constant(ir.VectorType(_int, width), list(half)) for half in halves)
        vector = _larger(builder, *(builder.shuffle_vector(vector, vector, mask) for mask in masks))
    return builder.extract_element(vector, ir.Constant(_int, 0))


# --- products, and weights ---------------------------------------------------------------------------


def _products(adds: bool) -> Any:
    """Return what multiplies `_TOGETHER` rows with `_WIDTH` columns, and `adds` that to what stands there.

    It is given where the rows' numbers begin and how many are from one to the next; the same of the other
    matrix, whose columns they are; how many numbers of a row are multiplied; where the products go, and how
    many numbers are from one row of these to the next; and where each row's factor on what is there stands.
    """

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows, row, columns, column, count, output, line, factors = arguments
        rows, columns, output, factors = (
            builder.inttoptr(x, _float.as_pointer()) for x in (rows, columns, output, factors)
        )
        places = [_place(builder, output, (line, one)) for one in range(_TOGETHER)]
        totals = [cgutils.alloca_once_value(builder, _all_of(0.0)) for _ in places]
        if adds:
            for one, (place, total) in enumerate(zip(places, totals, strict=True)):
                factor = builder.load(builder.gep(factors, [ir.Constant(_long, one)]), align=4)
                builder.store(builder.fmul(_load(builder, place), _spread(builder, factor)), total)
        with cgutils.for_range(builder, count) as loop:
            some = _load(builder, _place(builder, columns, (loop.index, column)))
            for one, total in enumerate(totals):
                number = builder.load(_place(builder, rows, (row, one), (loop.index, 1)), align=4)
                more = plus_product(builder, builder.load(total), _spread(builder, number), some)
                builder.store(more, total)
        for place, total in zip(places, totals, strict=True):
            _store(builder, builder.load(total), place)
        return context.get_dummy_value()

    @intrinsic
    def multiply(_context, rows, row, columns, column, count, output, line, factors):
        return types.void(*[types.int64] * 8), code

    return multiply


_multiply, _multiply_and_add = _products(adds=False), _products(adds=True)


@intrinsic
def _weigh(_context, logits, count, largest, factor, sums):
    """Make weights of a query's next logits: 2 to the power of what they are more than the largest.

    Given where they stand, and how many vectors they are; where the largest so far stands, which is raised;
    where to write the factor on what was weighed by the one before; and where the sums of the weights stand,
    a vector, to which these are added.
    """

    def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        count = arguments[1]
        logits, largest, factor, sums = (
            builder.inttoptr(arguments[i], _float.as_pointer()) for i in (0, 2, 3, 4)
        )
        most = cgutils.alloca_once_value(builder, _all_of(_HIDDEN))
        with cgutils.for_range(builder, count) as loop:
            some = _load(builder, _place(builder, logits, (loop.index, _WIDTH)))
            builder.store(_larger(builder, some, builder.load(most)), most)
        before = builder.load(largest, align=4)
        now = _larger(builder, _largest_of(builder, builder.load(most)), before)
        kept, least = _power(builder, builder.fsub(before, now)), _spread(builder, now)
        builder.store(now, largest, align=4)
        builder.store(kept, factor, align=4)
        total = builder.fmul(_load(builder, sums), _spread(builder, kept))
        total = cgutils.alloca_once_value(builder, total)
        with cgutils.for_range(builder, count) as loop:
            place = _place(builder, logits, (loop.index, _WIDTH))
            weight = _power(builder, builder.fsub(_load(builder, place), least))
            _store(builder, weight, place)
            builder.store(builder.fadd(builder.load(total), weight), total)
        _store(builder, builder.load(total), sums)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), code


# --- blocks ------------------------------------------------------------------------------------------


def columns_of(d: int) -> int:
    """Return how many numbers apart the values of keys must lie that have d each: whole vectors."""
    return (d + _WIDTH - 1) // _WIDTH * _WIDTH


def blocks_of(keys: int) -> int:
    """Return in how many blocks so many keys are."""
    return (keys + KEYS - 1) // KEYS


def room(d: int, columns: int) -> int:
    """Return how many numbers a thread of :func:`attend_blocks` writes to."""
    return QUERIES * (KEYS + d + columns + 2 + _WIDTH)


_columns_of, _blocks_of, _room = inner(columns_of), inner(blocks_of), inner(room)


@inner
def _part(given, number):
    """Return the numbers of a part, which stand behind those of all."""
    return carray(given, (11 + NUMBERS * (number + 1),))[11 + NUMBERS * number :]


@kernel
def turn_keys(given):
    """Turn a thread's share of blocks of keys around, each to (d, KEYS); lay values apart where they must be.

    Run by every thread, and given as to :func:`attend_blocks`.
    """
    a = carray(given, (11,))
    thread, threads = answer_of(a[2]), answer_of(a[3])
    groups, kv_heads, d = a[5] * a[7], a[7], a[9]
    columns = _columns_of(d)
    for number in range(a[4]):
        part = _part(given, number)
        count = part[12]
        blocks = _blocks_of(count)
        tasks = groups * blocks
        for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
            group, begin = task // blocks, task % blocks * KEYS
            row, head, there = group // kv_heads, group % kv_heads, min(KEYS, count - begin)
            keys_at, stride = part[4] + 4 * (row * part[5] + head * part[6] + begin * part[7]), part[7]
            keys = carray(floats_at(keys_at), ((there - 1) * stride + d,))
            turned = carray(floats_at(part[18] + 4 * task * d * KEYS), (d, KEYS))
            for k in range(0, KEYS, 16):
                for i in range(d):
                    for j in range(k, k + 16):
                        turned[i, j] = keys[j * stride + i] if j < there else f32(0)
            if columns != d:
                values_at, stride = (
                    part[8] + 4 * (row * part[9] + head * part[10] + begin * part[11]),
                    part[11],
                )
                values = carray(floats_at(values_at), ((there - 1) * stride + d,))
                apart_at = part[19] + 4 * (group * count + begin) * columns
                apart = carray(floats_at(apart_at), (there, columns))
                for j in range(there):
                    for i in range(columns):
                        apart[j, i] = values[j * stride + i] if i < d else f32(0)


@inner
def _hide(logits, some, kind, first, begin, there, masks, mask_row):
    """Hide from queries, the first of which is number `first`, keys from `begin` on that they do not see."""
    for q in range(some):
        low, high = 0, there
        if kind == LOWER:
            high = min(there, first + q + 1 - begin)
        if kind == UPPER:
            low = first + q - begin
        for k in range(0, low):
            logits[q, k] = f32(_HIDDEN)
        for k in range(max(0, high), KEYS):
            logits[q, k] = f32(_HIDDEN)
        if kind == MASK:
            mask = carray(bytes_at(masks + (first + q) * mask_row + begin), (there,))
            for k in range(there):
                logits[q, k] = logits[q, k] if mask[k] else f32(_HIDDEN)


@kernel
def attend_blocks(given):
    """Attend with a thread's share of blocks of queries; run by every thread, once keys are turned around.

    Given: output, (rows, heads, n, d); a place for each thread, as large as `room` says; what to ask for its
    number, and how many they are; how many parts there are; rows, heads, key-value heads, n, d, and scaling.
    Then of each part: where queries are, and how many numbers from one row, head and query to the next; the
    same of keys, and of values; how many keys; what queries see of them; where a mask is, a byte a key, and
    how many from one row, head and query to the next; where keys are turned around; and where values lie
    apart, if those of a key are not whole vectors.
    """
    a = carray(given, (11,))
    thread, threads = answer_of(a[2]), answer_of(a[3])
    rows, heads, kv_heads, n, d, scaling = a[5], a[6], a[7], a[8], a[9], number_of(a[10]) * _LOG2E
    columns, share = _columns_of(d), heads // kv_heads
    logits_at = a[1] + 4 * thread * _room(d, columns)
    queries_at = logits_at + 4 * QUERIES * KEYS
    output_at = queries_at + 4 * QUERIES * d
    sums_at = output_at + 4 * QUERIES * columns
    largest_at = sums_at + 4 * QUERIES * _WIDTH
    factors_at = largest_at + 4 * QUERIES
    logits = carray(floats_at(logits_at), (QUERIES, KEYS))
    queries = carray(floats_at(queries_at), (QUERIES, d))
    output = carray(floats_at(output_at), (QUERIES, columns))
    sums = carray(floats_at(sums_at), (QUERIES, _WIDTH))
    largest = carray(floats_at(largest_at), (QUERIES,))
    blocks = (n + QUERIES - 1) // QUERIES
    tasks = rows * heads * blocks
    for task in range(thread * tasks // threads, (thread + 1) * tasks // threads):
        row, head, first = task // (blocks * heads), task // blocks % heads, task % blocks * QUERIES
        kv_head, some = head // share, min(QUERIES, n - first)
        group, together = row * kv_heads + kv_head, (some + _TOGETHER - 1) // _TOGETHER * _TOGETHER
        output[:], sums[:], largest[:] = 0, 0, f32(_HIDDEN)
        for number in range(a[4]):
            part = _part(given, number)
            count, kind = part[12], part[13]
            asking_at, stride = part[0] + 4 * (row * part[1] + head * part[2] + first * part[3]), part[3]
            asking = carray(floats_at(asking_at), ((some - 1) * stride + d,))
            for q in range(together):
                for i in range(d):
                    queries[q, i] = asking[q * stride + i] * scaling if q < some else f32(0)
            turned_at = part[18] + 4 * group * _blocks_of(count) * d * KEYS
            values_at, stride = part[8] + 4 * (row * part[9] + kv_head * part[10]), part[11]
            if columns != d:
                values_at, stride = part[19] + 4 * group * count * columns, columns
            masks = part[14] + row * part[15] + head * part[16]
            begin = first if kind == UPPER else 0
            high = min(count, first + some) if kind == LOWER else count
            while begin < high:
                block, inside = begin // KEYS, begin % KEYS
                there = min(KEYS - inside, high - begin)
                vectors = (there + _WIDTH - 1) // _WIDTH
                for k in range(0, vectors * _WIDTH, _WIDTH):
                    for q in range(0, together, _TOGETHER):
                        keys_at = turned_at + 4 * (block * KEYS * d + inside + k)
                        to = logits_at + 4 * (q * KEYS + k)
                        _multiply(queries_at + 4 * q * d, d, keys_at, KEYS, d, to, KEYS, 0)
                if kind != ALL or there % _WIDTH:
                    _hide(logits, some, kind, first, begin, there, masks, part[17])
                for q in range(together):
                    at, sum_at = logits_at + 4 * q * KEYS, sums_at + 4 * q * _WIDTH
                    _weigh(at, vectors, largest_at + 4 * q, factors_at + 4 * q, sum_at)
                for i in range(0, columns, _WIDTH):
                    for q in range(0, together, _TOGETHER):
                        at, factors = logits_at + 4 * q * KEYS, factors_at + 4 * q
                        seen_at, to = values_at + 4 * (begin * stride + i), output_at + 4 * (q * columns + i)
                        _multiply_and_add(at, KEYS, seen_at, stride, there, to, columns, factors)
                begin += there
        given_back = carray(floats_at(a[0] + 4 * ((row * heads + head) * n + first) * d), (some, d))
        for q in range(some):
            total = f32(0)
            for i in range(_WIDTH):
                total += sums[q, i]
            for i in range(d):
                given_back[q, i] = output[q, i] / total
