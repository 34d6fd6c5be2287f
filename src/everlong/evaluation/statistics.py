"""Means, shares and differences with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

BLOCK = 32
"""Consecutive tokens that make one sample: surprisals of neighbours are correlated, their means hardly."""

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval.

    Attributes
    ----------
    mean, low, high : float
        The interval is infinite where there are fewer than two samples.
    samples : int
        Independent samples behind it.
    """

    mean: float
    low: float
    high: float
    samples: int


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of independent `values` with its interval by Student's t.

    Parameters
    ----------
    values : sequence of float
        At least one.
    """
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    half = _student(n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def stream_interval(values: Sequence[float]) -> Interval:
    """Return the mean of consecutive `values`, its interval from the means of blocks of `BLOCK` of them."""
    blocks = [values[start : start + BLOCK] for start in range(0, len(values), BLOCK)]
    if len(blocks) > 1 and len(blocks[-1]) < BLOCK:  # a short last block would weigh as much as a whole one
        blocks[-2:] = [[*blocks[-2], *blocks[-1]]]
    spread = mean_interval([fmean(block) for block in blocks])
    mean = fmean(values)
    return Interval(mean, mean - (spread.mean - spread.low), mean + (spread.high - spread.mean), len(blocks))


def share_interval(hits: float, samples: int) -> Interval:
    """Return a share with Wilson's score interval (Wilson 1927), good for few samples and near 0 and 1.

    Parameters
    ----------
    hits : float
        Samples that count. Where some count in part, their interval is a little wider than it need be.
    samples : int
        Of how many independent ones.
    """
    if not samples:
        return Interval(math.nan, 0.0, 1.0, 0)
    p, z2 = hits / samples, _Z**2
    middle = (p + z2 / (2 * samples)) / (1 + z2 / samples)
    half = _Z / (1 + z2 / samples) * math.sqrt(p * (1 - p) / samples + z2 / (4 * samples**2))
    low = 0.0 if hits == 0 else middle - half
    return Interval(p, low, 1.0 if hits == samples else middle + half, samples)


def paired_share_interval(first: Sequence[bool], second: Sequence[bool]) -> Interval:
    """Return by how much the share of `second` is above that of `first`, over the same samples.

    The interval is Agresti and Min's (2005): Wald's with half a sample added to each cell of the table, so
    that it does not vanish where all samples agree.

    Parameters
    ----------
    first, second : sequence of bool
        Whether each sample counted, in the same order.
    """
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    samples = len(first)
    if not samples:
        return Interval(math.nan, -1.0, 1.0, 0)
    n, difference, changed = samples + 2, gained - lost, gained + lost + 1
    half = _Z / n * math.sqrt(changed - difference**2 / n)
    middle = difference / n
    return Interval(difference / samples, max(-1.0, middle - half), min(1.0, middle + half), samples)


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    exact = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060}
    if freedom in exact:
        return exact[freedom]
    z = _Z  # Cornish and Fisher's expansion, exact to 1e-3 from here on
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
