"""The kernels, in the part of Python that Numba compiles; imported only where that is installed.

Each is given the address of whole numbers: addresses of tensors, sizes, and the bits of float64 numbers, in
the order in which it reads them. Tensors are of float32 numbers, or of bfloat16 ones, whose bits are uint16.

All are in one file, however long: what Numba keeps it takes for outdated by the file of a kernel alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

RUN = 128
"""Keys that a thread attends to at once: with their values they fit into its own cache."""

LOOKED = 256
"""Keys that a thread looks at before it seeks the largest products."""

_LINE = 64  # bytes that memory hands over at once
_AHEAD = 4096  # bytes: of 1,024 to 8,192 the best for heads of 64 numbers, on a processor with AVX2

_OPTIONS: dict[str, Any] = {
    "fastmath": {"reassoc", "contract"},  # sums in any order; but what is not a number stays that
    "error_model": "numpy",  # as PyTorch divides by zero
}
_part = njit(**_OPTIONS)


def _kernel(function: Any) -> Any:
    """Compile a kernel, and keep it for other processes where there is a place for it."""
    signature = types.void(types.CPointer(types.int64))
    try:
        return cfunc(signature, cache=True, **_OPTIONS)(function)
    except RuntimeError:  # no folder that can be written to
        return cfunc(signature, **_OPTIONS)(function)


_f, _u = np.float32, np.uint32


def _pointer(kind: Any) -> Any:
    """Return what makes a pointer to numbers of some kind of an address."""
    pointer = types.CPointer(kind)

    @intrinsic
    def made(_context: Any, address: Any) -> Any:
        def code(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), code

    return made


_floats, _halves, _longs, _bytes = map(_pointer, (types.float32, types.uint16, types.int64, types.int8))


@intrinsic
def _fetch(_context: Any, address: Any) -> Any:
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
def _asked(_context: Any, address: Any) -> Any:
    """Call the C function at an address, which takes nothing and returns an int."""

    def code(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.IntType(32), []).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], function), [])

    return types.int32(types.int64), code


@_part
def _number(bits):
    """Return the number whose bits, as of float64, a whole number has."""
    return _f(np.int64(bits).view(np.float64))


@_part
def _rounded(x):
    """Return the bits of the bfloat16 number that is nearest, of two the even one."""
    bits = _f(x).view(_u)
    nearest = _u(bits + _u(0x7FFF) + _u(_u(bits >> _u(16)) & _u(1))) >> _u(16)
    return np.uint16(0x7FC0) if (bits & _u(0x7FFFFFFF)) > _u(0x7F800000) else np.uint16(nearest)


@_part
def _widened(half):
    """Return a bfloat16 number, given as its bits."""
    return _u(_u(half) << _u(16)).view(_f)


@_part
def _exp(x):
    """Return e to the x, to about 1e-7 of it: e to the rest of x / log 2, a polynomial, times 2 to its floor.

    The coefficients are Cephes' (expf).
    """
    x = _f(-87) if x < _f(-87) else x
    x = _f(88) if x > _f(88) else x
    whole = np.floor(x * _f(1.44269504) + _f(0.5))
    rest = x - whole * _f(0.693359375) + whole * _f(2.12194440e-4)
    y = _f(1.9875691500e-4)
    y = y * rest + _f(1.3981999507e-3)
    y = y * rest + _f(8.3334519073e-3)
    y = y * rest + _f(4.1665795894e-2)
    y = y * rest + _f(1.6666665459e-1)
    y = y * rest + _f(5.0000001201e-1)
    power = np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(_f)
    return (y * rest * rest + rest + _f(1)) * power


# --- norms, and the MLP's middle ---------------------------------------------------------------------


@_kernel
def rms_norm(given):
    """Norm rows, shape (rows, d). Given: x, weight, output, rows, d, eps, plus (to the weight), is half."""
    a = carray(given, (8,))
    rows, d, eps, plus = a[3], a[4], _number(a[5]), _number(a[6])
    x, weight = carray(_floats(a[0]), (rows, d)), carray(_floats(a[1]), (d,))
    for row in range(rows):
        squares = _f(0)
        for i in range(d):
            squares += x[row, i] * x[row, i]
        inverse = _f(1) / np.sqrt(squares / _f(d) + eps)
        if a[7]:
            half = carray(_halves(a[2]), (rows, d))
            for i in range(d):
                half[row, i] = _rounded(x[row, i] * inverse * (weight[i] + plus))
        else:
            output = carray(_floats(a[2]), (rows, d))
            for i in range(d):
                output[row, i] = x[row, i] * inverse * (weight[i] + plus)


@_kernel
def gated(given):
    """Write x · sigmoid(slope · (x + cube · x³)) · up of rows of gates x and ups, in bfloat16.

    Given: gates and ups, shape (rows, 2, n), output, rows, n, slope, cube.
    """
    a = carray(given, (6,))
    rows, n, slope, cube = a[2], a[3], _number(a[4]), _number(a[5])
    given_rows, output = carray(_halves(a[0]), (rows, 2, n)), carray(_halves(a[1]), (rows, n))
    for row in range(rows):
        for i in range(n):
            x = _widened(given_rows[row, 0, i])
            sigmoid = _f(1) / (_f(1) + _exp(-slope * (x + cube * x * x * x)))
            output[row, i] = _rounded(x * sigmoid * _widened(given_rows[row, 1, i]))


# --- a token's place in the window -------------------------------------------------------------------


@_part
def _turn(x, cos, sin, output, width):
    """Rotate one head, dimension i with i + width / 2; the dimensions from width on stay."""
    middle = width // 2
    for i in range(middle):
        output[i] = x[i] * cos[i] + x[i + middle] * sin[i]
        output[i + middle] = x[i + middle] * cos[i + middle] + x[i] * sin[i + middle]
    for i in range(width, len(x)):
        output[i] = x[i]


@_kernel
def turn_and_put(given):
    """Rotate a token's queries and keys; put its keys and values, and rotated sinks, into a window.

    Given: queries, keys, values, cos, sin, slot, the window's keys and values, sinks, where keys go unrotated
    or 0, output; the strides of rows of queries, keys and values, and of the window's heads; rows, heads,
    key-value heads, d, how many of these are rotated, and how many sinks there are.
    """
    a = carray(given, (21,))
    rows, heads, kv_heads, d, width, sinks = a[15], a[16], a[17], a[18], a[19], a[20]
    cos, sin = carray(_floats(a[3]), (width,)), carray(_floats(a[4]), (width,))
    slot = carray(_longs(a[5]), (1,))[0]
    for row in range(rows):
        queries = carray(_floats(a[0] + 4 * row * a[11]), (heads, d))
        keys = carray(_floats(a[1] + 4 * row * a[12]), (kv_heads, d))
        values = carray(_floats(a[2] + 4 * row * a[13]), (kv_heads, d))
        output = carray(_floats(a[10] + 4 * row * heads * d), (heads, d))
        for head in range(heads):
            _turn(queries[head], cos, sin, output[head], width)
        for head in range(kv_heads):
            group = row * kv_heads + head
            window_keys = carray(_floats(a[6] + 4 * group * a[14]), (slot + 1, d))
            window_values = carray(_floats(a[7] + 4 * group * a[14]), (slot + 1, d))
            sink_keys = carray(_floats(a[8] + 4 * group * sinks * d), (sinks, d))
            for sink in range(sinks):
                for i in range(d):
                    window_keys[sink, i] = sink_keys[sink, i]
            _turn(keys[head], cos, sin, window_keys[slot], width)
            for i in range(d):
                window_values[slot, i] = values[head, i]
            if a[9]:
                window_raw = carray(_floats(a[9] + 4 * group * a[14]), (slot + 1, d))
                for i in range(d):
                    window_raw[slot, i] = keys[head, i]


# --- attention ---------------------------------------------------------------------------------------


@_part
def _fetch_ahead(rows, d):
    """Ask for the four rows of d numbers that are read some thousand bytes after those at an address."""
    ahead = max(_AHEAD, 32 * d)
    for line in range(0, 16 * d, _LINE):
        _fetch(rows + ahead + line)


@_part
def _logits(queries, at, count, scaling, logits):
    """Write the logits of a group's queries, shape (g, d), for `count` keys at an address, as (g, count)."""
    group, d = queries.shape
    keys = carray(_floats(at), (count, d))
    fours = count // 4 * 4
    for k in range(0, fours, 4):
        _fetch_ahead(at + 4 * k * d, d)
        for g in range(group):
            s0, s1, s2, s3 = _f(0), _f(0), _f(0), _f(0)
            for i in range(d):
                x = queries[g, i]
                s0 += x * keys[k, i]
                s1 += x * keys[k + 1, i]
                s2 += x * keys[k + 2, i]
                s3 += x * keys[k + 3, i]
            logits[g, k], logits[g, k + 1] = s0 * scaling, s1 * scaling
            logits[g, k + 2], logits[g, k + 3] = s2 * scaling, s3 * scaling
    for k in range(fours, count):
        for g in range(group):
            s0 = _f(0)
            for i in range(d):
                s0 += queries[g, i] * keys[k, i]
            logits[g, k] = s0 * scaling


@_part
def _weighed(weights, at, count, d, output):
    """Write the sum of `count` values at an address by the weights of a group's queries, shape (g, d)."""
    group, values = len(output), carray(_floats(at), (count, d))
    fours = count // 4 * 4
    for g in range(group):
        for i in range(d):
            output[g, i] = _f(0)
    for k in range(0, fours, 4):
        _fetch_ahead(at + 4 * k * d, d)
        for g in range(group):
            w0, w1, w2, w3 = weights[g, k], weights[g, k + 1], weights[g, k + 2], weights[g, k + 3]
            for i in range(d):
                output[g, i] += (
                    w0 * values[k, i] + w1 * values[k + 1, i] + w2 * values[k + 2, i] + w3 * values[k + 3, i]
                )
    for k in range(fours, count):
        for g in range(group):
            w0 = weights[g, k]
            for i in range(d):
                output[g, i] += w0 * values[k, i]


@_part
def _runs_of(count):
    return (count + RUN - 1) // RUN


@_part
def _part_of(given, number):
    """Return the five numbers of a part: the first stands at the beginning, others behind the rest."""
    a = carray(given, (15 + 5 * number,))
    return a[:5] if number == 0 else a[10 + 5 * number :]


@_part
def _all_runs(given):
    runs = 0
    for number in range(carray(given, (15,))[14] + 1):
        runs += _runs_of(carray(_longs(_part_of(given, number)[3]), (1,))[0])
    return runs


@_kernel
def attend_runs(given):
    """Attend to a thread's share of the runs of keys that all heads have; run by every thread.

    Given: of a part its queries, keys, values, where the number of its keys stands, and a group's stride in
    keys and values; output, what runs give, of shape (groups, runs, g, d + 2), a place for each thread's
    logits; what to ask for a thread's number, and how many they are; groups, g, d, and scaling; how many more
    parts there are, and of each of them what was given of the first. Of a run and a query remain the sum of
    its values, the largest logit, and the sum of the weights.
    """
    a = carray(given, (15,))
    groups, g, d, scaling = a[10], a[11], a[12], _number(a[13])
    thread, threads = _asked(a[8]), _asked(a[9])
    logits = carray(_floats(a[7] + 4 * thread * g * RUN), (g, RUN))
    runs = _all_runs(given)
    before = 0
    for number in range(a[14] + 1):
        part = _part_of(given, number)
        count = carray(_longs(part[3]), (1,))[0]
        own = _runs_of(count)
        # a share of all groups' runs, those of a part behind those of the parts before it
        low = max(thread * groups * runs // threads - groups * before, 0)
        high = min((thread + 1) * groups * runs // threads - groups * before, groups * own)
        for run in range(low, high):
            group, begin = run // own, run % own * RUN
            there = min(count - begin, RUN)
            where = 4 * (group * part[4] + begin * d)
            place = group * runs + before + run % own
            output = carray(_floats(a[6] + 4 * place * g * (d + 2)), (g, d + 2))
            queries = carray(_floats(part[0] + 4 * group * g * d), (g, d))
            _logits(queries, part[1] + where, there, scaling, logits)
            for i in range(g):
                largest = logits[i, 0]
                for k in range(there):
                    largest = logits[i, k] if logits[i, k] > largest else largest
                total = _f(0)
                for k in range(there):
                    weight = _exp(logits[i, k] - largest)
                    logits[i, k] = weight
                    total += weight
                output[i, d], output[i, d + 1] = largest, total
            _weighed(logits, part[2] + where, there, d, output)
        before += own


@_kernel
def merge_runs(given):
    """Merge what runs gave into one softmax; given as to :func:`attend_runs`."""
    a = carray(given, (15,))
    groups, g, d, runs = a[10], a[11], a[12], _all_runs(given)
    given_runs = carray(_floats(a[6]), (groups, runs, g, d + 2))
    output = carray(_floats(a[5]), (groups, g, d))
    for group in range(groups):
        for i in range(g):
            largest = given_runs[group, 0, i, d]
            for run in range(runs):
                other = given_runs[group, run, i, d]
                largest = other if other > largest else largest
            total = _f(0)
            for run in range(runs):
                weight = _exp(given_runs[group, run, i, d] - largest)
                given_runs[group, run, i, d] = weight
                total += weight * given_runs[group, run, i, d + 1]
            for j in range(d):
                value = _f(0)
                for run in range(runs):
                    value += given_runs[group, run, i, d] * given_runs[group, run, i, j]
                output[group, i, j] = value / total


# --- keys that are looked at -------------------------------------------------------------------------


@_part
def _products(asked, at, are_codes, count, shifts, rows, output):
    """Write the products of what asks, (c, d), with `count` keys at an address, plus a shift, as (c, count).

    Four at a time, whatever their number, so that the same key gives the same number wherever it stands;
    `rows`, (4, d), is where they are made numbers of, and behind the last there is room for three.
    """
    c, d = asked.shape
    keys, codes = carray(_floats(at), (count, d)), carray(_bytes(at), (count, d))
    for k in range(0, count, 4):
        for j in range(4):
            here = min(k + j, count - 1)
            if are_codes:
                for i in range(d):
                    rows[j, i] = _f(codes[here, i])
            else:
                for i in range(d):
                    rows[j, i] = keys[here, i]
        for one in range(c):
            s0, s1, s2, s3 = _f(0), _f(0), _f(0), _f(0)
            for i in range(d):
                x = asked[one, i]
                s0 += x * rows[0, i]
                s1 += x * rows[1, i]
                s2 += x * rows[2, i]
                s3 += x * rows[3, i]
            shift = shifts[one]
            output[one, k], output[one, k + 1] = s0 + shift, s1 + shift
            output[one, k + 2], output[one, k + 3] = s2 + shift, s3 + shift


@_part
def _prepare(asked, scales, centers, group, scaled, shifts):
    """Write what asks, (c, d), as codes are multiplied with it, and what is added; as it is for keys."""
    c, d = asked.shape
    for i in range(c):
        shifts[i] = _f(0)
        for j in range(d):
            scaled[i, j] = asked[i, j]
    if scales:
        scale, center = carray(_floats(scales), (group + 1, d)), carray(_floats(centers), (group + 1, d))
        for i in range(c):
            shift = _f(0)
            for j in range(d):
                scaled[i, j] = asked[i, j] * scale[group, j]
                shift += asked[i, j] * center[group, j]
            shifts[i] = shift


@_part
def _raise_maxima(products, count, at, block, found):
    """Raise the maxima of blocks, (c, blocks), to the products of tokens that are the `at`-th and on."""
    for one in range(len(products)):
        k = 0
        while k < count:
            number = (at + k) // block
            stop = min(count, (number + 1) * block - at)
            largest = found[one, number]
            for j in range(k, stop):
                largest = products[one, j] if products[one, j] > largest else largest
            found[one, number] = largest
            k = stop


@_kernel
def look(given):
    """Raise the maxima of a thread's share of blocks to the products of what asks with their keys.

    Keys are in segments; in bytes, a key is center + scale · code in each dimension, both of its segment. Run
    by every thread. Given: what asks, (heads, c, d); where the keys or codes of each segment lie, and the
    stride of its heads in numbers; scales and centers, (segments, heads, d), or 0 and 0: they are no codes;
    the maxima, (heads, c, blocks); a place for each thread; what to ask for its number, and how many they
    are; segments, heads, c, d, blocks, tokens of a block and of a segment; the token that the first segment
    begins with, the one that the first block begins with, and the tokens looked at, from one to before
    another, all of which are in the segments.
    """
    a = carray(given, (20,))
    segments, heads, c, d, blocks, block, segment = a[9], a[10], a[11], a[12], a[13], a[14], a[15]
    first, begin, low, high = a[16], a[17], a[18], a[19]
    thread, threads = _asked(a[7]), _asked(a[8])
    are_codes = a[3] != 0
    places, strides = carray(_longs(a[1]), (segments,)), carray(_longs(a[2]), (segments,))
    width = LOOKED + 3
    scratch = a[6] + 4 * thread * (4 * d + c * (d + 1 + width))
    rows, scaled = carray(_floats(scratch), (4, d)), carray(_floats(scratch + 16 * d), (c, d))
    shifts = carray(_floats(scratch + 4 * d * (4 + c)), (c,))
    products = carray(_floats(scratch + 4 * (d * (4 + c) + c)), (c, width))
    since = (low - begin) // block
    looked = heads * ((high - begin + block - 1) // block - since)
    one, last = thread * looked // threads, (thread + 1) * looked // threads
    while one < last:
        head, number = one // (looked // heads), one % (looked // heads)
        some = min(last - one, looked // heads - number)
        one += some
        asked = carray(_floats(a[0] + 4 * head * c * d), (c, d))
        found = carray(_floats(a[5] + 4 * head * c * blocks), (c, blocks))
        token = max(low, begin + (since + number) * block)
        stop = min(high, begin + (since + number + some) * block)
        while token < stop:
            place = token // segment - first // segment
            count = min(stop - token, LOOKED, segment - token % segment)
            _prepare(asked, a[3], a[4], place * heads + head, scaled, shifts)
            at = head * strides[place] + (token - max(first, token // segment * segment)) * d
            at = places[place] + (at if are_codes else 4 * at)
            _products(scaled, at, are_codes, count, shifts, rows, products)
            _raise_maxima(products, count, token - begin, block, found)
            token += count
