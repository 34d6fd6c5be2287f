"""Means and their intervals, against a table, numerical integration and random draws."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from everlong.evaluation.statistics import (
    BLOCK,
    Interval,
    mean_interval,
    paired_share_interval,
    share_interval,
    stream_interval,
)


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


# --- shares -------------------------------------------------------------------------------------------


def test_wilsons_interval_is_the_textbooks_and_solves_its_equation() -> None:
    found = share_interval(0, 30)
    assert (found.mean, found.low, found.high) == (0, 0, pytest.approx(0.1135, abs=1e-4))
    for hits, samples in ((1, 10), (20, 30), (67, 100), (240, 240)):
        found = share_interval(hits, samples)
        assert found.mean == hits / samples and found.samples == samples
        for bound in {found.low, found.high} - {0.0, 1.0}:
            assert abs(bound - found.mean) == pytest.approx(
                1.959964 * math.sqrt(bound * (1 - bound) / samples)
            )
    assert share_interval(240, 240).high == 1.0
    assert share_interval(0, 0).samples == 0 and math.isnan(share_interval(0, 0).mean)


def test_a_paired_difference_is_as_wide_as_what_changed_and_never_of_no_width() -> None:
    before, after = [False] * 20 + [True] * 10, [True] * 30
    found = paired_share_interval(before, after)
    assert found.mean == pytest.approx(2 / 3) and found.low < 2 / 3 < found.high <= 1
    assert paired_share_interval(after, before).mean == pytest.approx(-2 / 3)
    same = paired_share_interval(after, after)
    assert same.mean == 0 and same.low == pytest.approx(-same.high) and 0.05 < same.high < 0.1
    n, d, changed = 32, 20, 21  # half a sample more in each cell
    half = 1.959964 / n * math.sqrt(changed - d * d / n)
    assert (found.low, found.high) == pytest.approx((d / n - half, d / n + half))
    with pytest.raises(ValueError):
        paired_share_interval([True], [True, False])


def test_pairs_cover_the_difference_of_correlated_answers() -> None:
    draw = random.Random(2)
    covered = 0
    for _ in range(400):
        luck = [draw.random() for _ in range(60)]
        before = [each < 0.3 for each in luck]
        after = [each < 0.3 or draw.random() < 0.2 for each in luck]
        found = paired_share_interval(before, after)
        covered += found.low <= 0.14 <= found.high
    assert 365 <= covered <= 398  # 380 of 400 would be 95 %
