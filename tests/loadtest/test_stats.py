"""Statistics a verdict rests on: intervals that cover, refusals, windows, exact merging."""

from __future__ import annotations

import math

import numpy as np
import pytest
from convserve.loadtest.histogram import Histogram
from convserve.loadtest.stats import (
    block_bootstrap,
    distribution,
    mean_estimate,
    min_samples,
    mser5,
    percentile,
    slope_t,
    student_t,
    wilson,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(("q", "needed"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)])
def test_no_percentile_without_enough_samples(q, needed):
    """A p99 of 100 requests is their maximum, whatever it is called."""
    assert min_samples(q) == needed
    values = np.linspace(1, 2, needed)
    assert percentile(values, q).value == pytest.approx(np.quantile(values, q))
    refused = percentile(values[:-1], q)
    assert refused.value is None
    assert refused.reason == f"needs {needed} samples, has {needed - 1}"


@pytest.mark.parametrize("correlation", [0.0, 0.6])
@pytest.mark.parametrize("q", [0.5, 0.9])
def test_intervals_cover_the_truth_even_when_neighbours_resemble_each_other(correlation, q):
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(120):
        noise = generator.normal(size=500) * math.sqrt(1 - correlation**2)
        series = [noise[0]]
        for step in noise[1:]:
            series.append(correlation * series[-1] + step)
        found = percentile(np.exp(series[100:]), q)
        truth = math.exp({0.5: 0.0, 0.9: 1.2816}[q])
        covered += found.low <= truth <= found.high
    assert covered / 120 > 0.88


def test_mean_interval_widens_with_correlation():
    generator = np.random.default_rng(0)
    independent = generator.normal(size=2000)
    walk = np.repeat(generator.normal(size=40), 50)
    narrow, wide = mean_estimate(independent), mean_estimate(walk)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_student_t_and_wilson_match_tables():
    assert student_t(9) == pytest.approx(2.262, rel=0.01)
    assert student_t(29) == pytest.approx(2.045, rel=0.005)
    assert wilson(0.0, 100)[0] == 0.0
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-3)


def test_mser_drops_the_transient_and_keeps_a_steady_series():
    generator = np.random.default_rng(1)
    steady = 10 + generator.normal(size=600)
    warm = np.concatenate([np.linspace(40, 10, 100) + generator.normal(size=100), steady])
    drop, found = mser5(warm)
    assert found
    assert 80 <= drop <= 160
    assert mser5(np.full(200, 3.0)) == (0, True)
    assert mser5(np.arange(400.0))[1] is False


def test_slope_tells_growth_from_noise():
    times = np.arange(100.0)
    generator = np.random.default_rng(2)
    assert abs(slope_t(times, generator.normal(size=100))[1]) < 4
    slope, t = slope_t(times, 0.5 * times + generator.normal(size=100))
    assert slope == pytest.approx(0.5, rel=0.05)
    assert t > 50


def test_block_bootstrap_keeps_the_values_and_their_neighbours():
    series = np.arange(100.0)
    drawn = block_bootstrap(series, 50, np.random.default_rng(0))
    assert drawn.shape == (50, 100)
    assert set(drawn.ravel()) <= set(series)
    assert np.mean(np.diff(drawn, axis=1) == 1) > 0.7


def test_distribution_names_what_it_has():
    found = distribution(np.linspace(0.01, 0.02, 50))
    assert found.count == 50
    assert found.percentiles["p90"].value is not None
    assert found.percentiles["p99.9"].reason == "needs 3688 samples, has 50"


durations = st.lists(st.floats(1e-6, 3600), min_size=1, max_size=200)


@given(durations, st.floats(0.0, 1.0))
def test_histogram_percentiles_are_within_a_tenth_of_a_percent(values, q):
    rank = min(max(math.ceil(q * len(values)), 1), len(values))
    truth = sorted(values)[rank - 1]
    assert Histogram.of(values).percentile(q) == pytest.approx(truth, rel=1e-3, abs=6e-7)


@settings(max_examples=30)
@given(durations, durations)
def test_histograms_of_workers_add_up(left, right):
    merged = Histogram.of(left)
    merged.merge(Histogram.from_sparse(Histogram.of(right).to_sparse()))
    whole = Histogram.of(left + right)
    assert (merged.counts == whole.counts).all()
    assert merged.total == len(left) + len(right)
    assert merged.mean() == pytest.approx(np.mean(left + right), rel=1e-3, abs=6e-7)


def test_empty_histogram_has_no_percentile():
    assert Histogram().percentile(0.5) is None
    assert Histogram().mean() is None
