"""Means with their 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

BLOCK = 32
"""Consecutive tokens that make one sample: surprisals of neighbours are correlated, their means hardly."""


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


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t."""
    exact = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060}
    if freedom in exact:
        return exact[freedom]
    z = NormalDist().inv_cdf(0.975)  # Cornish and Fisher's expansion, exact to 1e-3 from here on
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
