"""The kernel that looks at keys, in the part of Python that Numba compiles; given as those of `compiled`."""

from __future__ import annotations

from numba import carray

from everlong.kernels.compiling import answer_of, bytes_at, f32, floats_at, inner, kernel, longs_at

_MADE_OF = "a082c9c806e21575"  # of compiling.py: when that changes, what Numba keeps of these is outdated

LOOKED = 256
"""Keys that a thread looks at before it seeks the largest products."""


@inner
def _products(asked, at, are_codes, count, shifts, rows, output):
    """Write the products of what asks, (c, d), with `count` keys at an address, plus a shift, as (c, count).

    Four at a time, whatever their number, so that the same key gives the same number wherever it stands;
    `rows`, (4, d), is where they are made numbers of, and behind the last there is room for three.
    """
    c, d = asked.shape
    keys, codes = carray(floats_at(at), (count, d)), carray(bytes_at(at), (count, d))
    for k in range(0, count, 4):
        for j in range(4):
            here = min(k + j, count - 1)
            if are_codes:
                for i in range(d):
                    rows[j, i] = f32(codes[here, i])
            else:
                for i in range(d):
                    rows[j, i] = keys[here, i]
        for one in range(c):
            s0, s1, s2, s3 = f32(0), f32(0), f32(0), f32(0)
            for i in range(d):
                x = asked[one, i]
                s0 += x * rows[0, i]
                s1 += x * rows[1, i]
                s2 += x * rows[2, i]
                s3 += x * rows[3, i]
            shift = shifts[one]
            output[one, k], output[one, k + 1] = s0 + shift, s1 + shift
            output[one, k + 2], output[one, k + 3] = s2 + shift, s3 + shift


@inner
def _prepare(asked, scales, centers, group, scaled, shifts):
    """Write what asks, (c, d), as codes are multiplied with it, and what is added; as it is for keys."""
    c, d = asked.shape
    for i in range(c):
        shifts[i] = f32(0)
        for j in range(d):
            scaled[i, j] = asked[i, j]
    if scales:
        scale, center = carray(floats_at(scales), (group + 1, d)), carray(floats_at(centers), (group + 1, d))
        for i in range(c):
            shift = f32(0)
            for j in range(d):
                scaled[i, j] = asked[i, j] * scale[group, j]
                shift += asked[i, j] * center[group, j]
            shifts[i] = shift


@inner
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


@kernel
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
    thread, threads = answer_of(a[7]), answer_of(a[8])
    are_codes = a[3] != 0
    places, strides = carray(longs_at(a[1]), (segments,)), carray(longs_at(a[2]), (segments,))
    width = LOOKED + 3
    scratch = a[6] + 4 * thread * (4 * d + c * (d + 1 + width))
    rows, scaled = carray(floats_at(scratch), (4, d)), carray(floats_at(scratch + 16 * d), (c, d))
    shifts = carray(floats_at(scratch + 4 * d * (4 + c)), (c,))
    products = carray(floats_at(scratch + 4 * (d * (4 + c) + c)), (c, width))
    since = (low - begin) // block
    looked = heads * ((high - begin + block - 1) // block - since)
    one, last = thread * looked // threads, (thread + 1) * looked // threads
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
            _prepare(asked, a[3], a[4], place * heads + head, scaled, shifts)
            at = head * strides[place] + (token - max(first, token // segment * segment)) * d
            at = places[place] + (at if are_codes else 4 * at)
            _products(scaled, at, are_codes, count, shifts, rows, products)
            _raise_maxima(products, count, token - begin, block, found)
            token += count
