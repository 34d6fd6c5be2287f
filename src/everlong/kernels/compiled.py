"""The kernels, in the part of Python that Numba compiles; imported only where that is installed.

Each is given the address of whole numbers: addresses of tensors, sizes, and the bits of float64 numbers, in
the order in which it reads them. Tensors are of float32 numbers, or of bfloat16 ones, whose bits are uint16.
"""

from __future__ import annotations

import numpy as np
from numba import carray

from everlong.kernels.compiling import (
    answer_of,
    exp,
    f32,
    fetch,
    floats_at,
    halves_at,
    inner,
    kernel,
    longs_at,
    number_of,
    rounded,
    widened,
)
from everlong.kernels.looking import look, room

__all__ = ["RUN", "attend_runs", "gated", "look", "merge_runs", "rms_norm", "room", "turn_and_put"]

_MADE_OF = "106b627f519cf9eb"  # of compiling.py and tiles.py: when they change, what Numba keeps is outdated

RUN = 128
"""Keys that a thread attends to at once: with their values they fit into its own cache."""

_LINE = 64  # bytes that memory hands over at once
_AHEAD = 4096  # bytes: of 1,024 to 8,192 the best for heads of 64 numbers, on a processor with AVX2


# --- norms, and the MLP's middle ---------------------------------------------------------------------


@kernel
def rms_norm(given):
    """Norm rows, shape (rows, d). Given: x, weight, output, rows, d, eps, plus (to the weight), is half."""
    a = carray(given, (8,))
    rows, d, eps, plus = a[3], a[4], number_of(a[5]), number_of(a[6])
    x, weight = carray(floats_at(a[0]), (rows, d)), carray(floats_at(a[1]), (d,))
    for row in range(rows):
        squares = f32(0)
        for i in range(d):
            squares += x[row, i] * x[row, i]
        inverse = f32(1) / np.sqrt(squares / f32(d) + eps)
        if a[7]:
            half = carray(halves_at(a[2]), (rows, d))
            for i in range(d):
                half[row, i] = rounded(x[row, i] * inverse * (weight[i] + plus))
        else:
            output = carray(floats_at(a[2]), (rows, d))
            for i in range(d):
                output[row, i] = x[row, i] * inverse * (weight[i] + plus)


@kernel
def gated(given):
    """Write x · sigmoid(slope · (x + cube · x³)) · up of rows of gates x and ups, in bfloat16.

    Given: gates and ups, shape (rows, 2, n), output, rows, n, slope, cube.
    """
    a = carray(given, (6,))
    rows, n, slope, cube = a[2], a[3], number_of(a[4]), number_of(a[5])
    given_rows, output = carray(halves_at(a[0]), (rows, 2, n)), carray(halves_at(a[1]), (rows, n))
    for row in range(rows):
        for i in range(n):
            x = widened(given_rows[row, 0, i])
            sigmoid = f32(1) / (f32(1) + exp(-slope * (x + cube * x * x * x)))
            output[row, i] = rounded(x * sigmoid * widened(given_rows[row, 1, i]))


# --- a token's place in the window -------------------------------------------------------------------


@inner
def _turn(x, cos, sin, output, width):
    """Rotate one head, dimension i with i + width / 2; the dimensions from width on stay."""
    middle = width // 2
    for i in range(middle):
        output[i] = x[i] * cos[i] + x[i + middle] * sin[i]
        output[i + middle] = x[i + middle] * cos[i + middle] + x[i] * sin[i + middle]
    for i in range(width, len(x)):
        output[i] = x[i]


@kernel
def turn_and_put(given):
    """Rotate a token's queries and keys; put its keys and values, and rotated sinks, into a window.

    Given: queries, keys, values, cos, sin, slot, the window's keys and values, sinks, where keys go unrotated
    or 0, output; the strides of rows of queries, keys and values, and of the window's heads; rows, heads,
    key-value heads, d, how many of these are rotated, and how many sinks there are; cos and sin by which
    queries are rotated to a second place, and output for these, or 0, 0 and 0.
    """
    a = carray(given, (24,))
    rows, heads, kv_heads, d, width, sinks = a[15], a[16], a[17], a[18], a[19], a[20]
    cos, sin = carray(floats_at(a[3]), (width,)), carray(floats_at(a[4]), (width,))
    slot = carray(longs_at(a[5]), (1,))[0]
    for row in range(rows):
        queries = carray(floats_at(a[0] + 4 * row * a[11]), (heads, d))
        keys = carray(floats_at(a[1] + 4 * row * a[12]), (kv_heads, d))
        values = carray(floats_at(a[2] + 4 * row * a[13]), (kv_heads, d))
        output = carray(floats_at(a[10] + 4 * row * heads * d), (heads, d))
        for head in range(heads):
            _turn(queries[head], cos, sin, output[head], width)
        if a[23]:
            far_cos, far_sin = carray(floats_at(a[21]), (width,)), carray(floats_at(a[22]), (width,))
            far = carray(floats_at(a[23] + 4 * row * heads * d), (heads, d))
            for head in range(heads):
                _turn(queries[head], far_cos, far_sin, far[head], width)
        for head in range(kv_heads):
            group = row * kv_heads + head
            window_keys = carray(floats_at(a[6] + 4 * group * a[14]), (slot + 1, d))
            window_values = carray(floats_at(a[7] + 4 * group * a[14]), (slot + 1, d))
            sink_keys = carray(floats_at(a[8] + 4 * group * sinks * d), (sinks, d))
            for sink in range(sinks):
                for i in range(d):
                    window_keys[sink, i] = sink_keys[sink, i]
            _turn(keys[head], cos, sin, window_keys[slot], width)
            for i in range(d):
                window_values[slot, i] = values[head, i]
            if a[9]:
                window_raw = carray(floats_at(a[9] + 4 * group * a[14]), (slot + 1, d))
                for i in range(d):
                    window_raw[slot, i] = keys[head, i]


# --- attention ---------------------------------------------------------------------------------------


@inner
def _fetch_ahead(rows, d):
    """Ask for the four rows of d numbers that are read some thousand bytes after those at an address."""
    ahead = max(_AHEAD, 32 * d)
    for line in range(0, 16 * d, _LINE):
        fetch(rows + ahead + line)


@inner
def _logits(queries, at, count, scaling, logits):
    """Write the logits of a group's queries, shape (g, d), for `count` keys at an address, as (g, count)."""
    group, d = queries.shape
    keys = carray(floats_at(at), (count, d))
    fours = count // 4 * 4
    for k in range(0, fours, 4):
        _fetch_ahead(at + 4 * k * d, d)
        for g in range(group):
            s0, s1, s2, s3 = f32(0), f32(0), f32(0), f32(0)
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
            s0 = f32(0)
            for i in range(d):
                s0 += queries[g, i] * keys[k, i]
            logits[g, k] = s0 * scaling


@inner
def _weighed(weights, at, count, d, output):
    """Write the sum of `count` values at an address by the weights of a group's queries, shape (g, d)."""
    group, values = len(output), carray(floats_at(at), (count, d))
    fours = count // 4 * 4
    for g in range(group):
        for i in range(d):
            output[g, i] = f32(0)
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


@inner
def _runs_of(count):
    return (count + RUN - 1) // RUN


@inner
def _part_of(given, number):
    """Return the five numbers of a part: the first stands at the beginning, others behind the rest."""
    a = carray(given, (15 + 5 * number,))
    return a[:5] if number == 0 else a[10 + 5 * number :]


@inner
def _all_runs(given):
    runs = 0
    for number in range(carray(given, (15,))[14] + 1):
        runs += _runs_of(carray(longs_at(_part_of(given, number)[3]), (1,))[0])
    return runs


@kernel
def attend_runs(given):
    """Attend to a thread's share of the runs of keys that all heads have; run by every thread.

    Given: of a part its queries, keys, values, where the number of its keys stands, and a group's stride in
    keys and values; output, what runs give, of shape (groups, runs, g, d + 2), a place for each thread's
    logits; what to ask for a thread's number, and how many they are; groups, g, d, and scaling; how many more
    parts there are, and of each of them what was given of the first. Of a run and a query remain the sum of
    its values, the largest logit, and the sum of the weights.
    """
    a = carray(given, (15,))
    groups, g, d, scaling = a[10], a[11], a[12], number_of(a[13])
    thread, threads = answer_of(a[8]), answer_of(a[9])
    logits = carray(floats_at(a[7] + 4 * thread * g * RUN), (g, RUN))
    runs = _all_runs(given)
    before = 0
    for number in range(a[14] + 1):
        part = _part_of(given, number)
        count = carray(longs_at(part[3]), (1,))[0]
        own = _runs_of(count)
        # a share of all groups' runs, those of a part behind those of the parts before it
        low = max(thread * groups * runs // threads - groups * before, 0)
        high = min((thread + 1) * groups * runs // threads - groups * before, groups * own)
        for run in range(low, high):
            group, begin = run // own, run % own * RUN
            there = min(count - begin, RUN)
            where = 4 * (group * part[4] + begin * d)
            place = group * runs + before + run % own
            output = carray(floats_at(a[6] + 4 * place * g * (d + 2)), (g, d + 2))
            queries = carray(floats_at(part[0] + 4 * group * g * d), (g, d))
            _logits(queries, part[1] + where, there, scaling, logits)
            for i in range(g):
                largest = logits[i, 0]
                for k in range(there):
                    largest = logits[i, k] if logits[i, k] > largest else largest
                total = f32(0)
                for k in range(there):
                    weight = exp(logits[i, k] - largest)
                    logits[i, k] = weight
                    total += weight
                output[i, d], output[i, d + 1] = largest, total
            _weighed(logits, part[2] + where, there, d, output)
        before += own


@kernel
def merge_runs(given):
    """Merge what runs gave into one softmax; given as to :func:`attend_runs`."""
    a = carray(given, (15,))
    groups, g, d, runs = a[10], a[11], a[12], _all_runs(given)
    given_runs = carray(floats_at(a[6]), (groups, runs, g, d + 2))
    output = carray(floats_at(a[5]), (groups, g, d))
    for group in range(groups):
        for i in range(g):
            largest = given_runs[group, 0, i, d]
            for run in range(runs):
                other = given_runs[group, run, i, d]
                largest = other if other > largest else largest
            total = f32(0)
            for run in range(runs):
                weight = exp(given_runs[group, run, i, d] - largest)
                given_runs[group, run, i, d] = weight
                total += weight * given_runs[group, run, i, d + 1]
            for j in range(d):
                value = f32(0)
                for run in range(runs):
                    value += given_runs[group, run, i, d] * given_runs[group, run, i, j]
                output[group, i, j] = value / total
