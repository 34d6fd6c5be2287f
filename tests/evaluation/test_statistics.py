"""Means and their intervals, against a table, numerical integration and random draws."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from everlong.evaluation.statistics import BLOCK, Interval, mean_interval, stream_interval


def quantile(found: Interval, values: list[float]) -> float:
    """The factor of the standard error that gave the interval."""
    return (found.high - found.mean) * math.sqrt(len(values)) / stdev(values)


def coverage(t: float, freedom: int, steps: int = 4000) -> float:
    """Probability of Student's t between -t and t, by Simpson's rule on its density."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    constant /= math.sqrt(freedom * math.pi)

    def density(x: float) -> float:
        return constant * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    h = t / steps
    weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
    return 2 * h / 3 * sum(weight * density(i * h) for i, weight in enumerate(weights))


def test_a_small_sample_has_the_interval_of_the_textbook() -> None:
    found = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.1824 * math.sqrt(5 / 3) / 2
    assert (found.mean, found.samples) == (2.5, 4)
    assert (found.low, found.high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-4)


@pytest.mark.parametrize("samples", [*range(2, 14), 20, 50, 1000])
def test_the_interval_covers_95_percent_of_students_t(samples: int) -> None:
    draw = random.Random(samples)
    values = [draw.gauss(3, 2) for _ in range(samples)]
    found = mean_interval(values)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    assert coverage(quantile(found, values), samples - 1) == pytest.approx(0.95, abs=1e-4)


def test_one_sample_has_a_mean_and_no_bounds() -> None:
    assert mean_interval([7.0]) == Interval(7.0, -math.inf, math.inf, 1)
    assert stream_interval([7.0] * (2 * BLOCK - 1)) == Interval(7.0, -math.inf, math.inf, 1)


def test_equal_samples_have_an_interval_of_no_width() -> None:
    assert mean_interval([2.0] * 5) == Interval(2.0, 2.0, 2.0, 5)


def test_a_stream_is_cut_into_blocks_and_a_short_end_joins_the_last() -> None:
    draw = random.Random(0)
    for length, starts in ((3 * BLOCK, (0, 32, 64)), (4 * BLOCK - 1, (0, 32, 64)), (2 * BLOCK + 5, (0, 32))):
        values = [draw.random() for _ in range(length)]
        stops = (*starts[1:], length)
        means = [fmean(values[start:stop]) for start, stop in zip(starts, stops, strict=True)]
        found, blocks = stream_interval(values), mean_interval(means)
        assert found.mean == pytest.approx(fmean(values))  # each token weighs the same, in the long block too
        assert found.samples == len(starts)
        assert found.high - found.low == pytest.approx(blocks.high - blocks.low)


def test_neighbours_that_are_alike_widen_a_streams_interval_until_it_covers_the_mean() -> None:
    draw = random.Random(1)
    covered = naive = 0
    for _ in range(300):
        value, values = draw.gauss(0, 1), []
        for _ in range(40 * BLOCK):
            value = 0.8 * value + 0.6 * draw.gauss(0, 1)
            values.append(value)
        found, ignorant = stream_interval(values), mean_interval(values)
        covered += found.low <= 0 <= found.high
        naive += ignorant.low <= 0 <= ignorant.high
    assert covered >= 265 and naive <= 225  # 285 of 300 would be 95 %
