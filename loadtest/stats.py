"""Percentiles with honest intervals, the steady-state window, and block bootstraps.

All functions take values in time order, because neighbours in a load test resemble each other and
an interval that ignores this is too narrow. Knows nothing of requests; seconds in, seconds out.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
PERCENTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


class Percentile(msgspec.Struct, frozen=True, kw_only=True):
    """One percentile with its 95 % interval, or the reason why there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """A mean or a rate with its 95 % interval (None when too few batches)."""

    value: float
    low: float | None = None
    high: float | None = None


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of one figure over the requests (or tokens) of a window; seconds."""

    count: int
    mean: Estimate
    std: float
    min: float
    max: float
    percentiles: dict[str, Percentile]
    """By name: p50, p90, p99.9, ..."""


def percentile_name(q: float) -> str:
    """0.5 -> p50, 0.999 -> p99.9."""
    return f"p{q * 100:.6g}"


def min_samples(q: float) -> int:
    """Fewest samples for which a distribution-free two-sided 95 % interval of percentile q exists:
    the chance that all of n samples fall on one side of it, max(q, 1-q)**n, must be <= 2.5 %."""
    return math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log(max(q, 1 - q)))


def student_t(dof: int) -> float:
    """Two-sided 95 % quantile of Student's t (Cornish-Fisher; within 1 % from 4 degrees up)."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / dof ** (k + 1) for k, term in enumerate(terms))


def batch_means(values: ArrayLike) -> NDArray[np.float64] | None:
    """Means of 10 to 30 equal, contiguous batches of at least 10; None below 100 values."""
    series = np.asarray(values, dtype=np.float64)
    if series.size < 100:
        return None
    batches = min(30, series.size // 10)
    length = series.size // batches
    return series[series.size - batches * length :].reshape(batches, length).mean(axis=1)


def _effective(indicator: NDArray[np.bool_], q: float) -> tuple[float, float]:
    """(effective sample size, critical value) of a share near q, from batch means of it."""
    n = indicator.size
    means = batch_means(indicator)
    if means is None or q in (0.0, 1.0):
        return n, NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    length = n // means.size
    inflation = max(1.0, length * float(means.var(ddof=1)) / (q * (1 - q)))
    return n / inflation, student_t(means.size - 1)


def wilson(share: float, n: float, critical: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share observed in n (effective) trials."""
    if n <= 0:
        return 0.0, 1.0
    square = critical * critical / n
    middle = share + square / 2
    half = critical * math.sqrt(share * (1 - share) / n + square / (4 * n))
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))


def percentile(
    values: ArrayLike, q: float, ordered: NDArray[np.float64] | None = None
) -> Percentile:
    """Percentile q (0..1) of values in time order.

    The interval is Wilson's interval of the share below the percentile, whose variance comes from
    batch means of the indicator "value <= percentile", carried over to values by rank. It needs no
    normality, widens with autocorrelation, and is the order-statistic interval when there is none.

    Args:
        ordered: the same values sorted, when the caller has them.
    """
    series = np.asarray(values, dtype=np.float64)
    n, needed = series.size, min_samples(q)
    if n < needed:
        return Percentile(reason=f"needs {needed} samples, has {n}")
    ranked = np.sort(series) if ordered is None else ordered
    value = float(np.quantile(ranked, q))
    size, critical = _effective(series <= value, q)
    low, high = wilson(q, size, critical)
    return Percentile(
        value=value,
        low=float(ranked[max(math.floor(low * n) - 1, 0)]),
        high=float(ranked[min(math.ceil(high * n), n - 1)]),
    )


def mean_estimate(values: ArrayLike) -> Estimate:
    """Mean with a batch-means interval (plain Student's t below 100 values)."""
    series = np.asarray(values, dtype=np.float64)
    means = batch_means(series)
    sample = series if means is None else means
    centre = float(series.mean())
    if sample.size < 5:
        return Estimate(value=centre)
    half = student_t(sample.size - 1) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return Estimate(value=centre, low=centre - half, high=centre + half)


def distribution(values: ArrayLike, percentiles: tuple[float, ...] = PERCENTILES) -> Distribution:
    """Summarises values in time order (at least one)."""
    series = np.asarray(values, dtype=np.float64)
    ranked = np.sort(series)
    return Distribution(
        count=series.size,
        mean=mean_estimate(series),
        std=float(series.std(ddof=1)) if series.size > 1 else 0.0,
        min=float(ranked[0]),
        max=float(ranked[-1]),
        percentiles={percentile_name(q): percentile(series, q, ranked) for q in percentiles},
    )


def mser5(values: ArrayLike) -> tuple[int, bool]:
    """Length of the initial transient by MSER-5 (White, 1997).

    Averages groups of 5, then drops the prefix that minimises the squared standard error of the
    mean of what is left.

    Returns:
        (values to drop, whether a steady state was found). The best prefix reaching half of the
        series means the series never settled.
    """
    series = np.asarray(values, dtype=np.float64)
    groups = series.size // 5
    if groups < 8:
        return 0, True
    means = series[: groups * 5].reshape(groups, 5).mean(axis=1)
    tail_count = np.arange(groups, 0, -1)
    tail_sum = np.cumsum(means[::-1])[::-1]
    tail_square = np.cumsum((means**2)[::-1])[::-1]
    error = np.maximum(tail_square - tail_sum**2 / tail_count, 0.0) / tail_count**2
    half = groups // 2
    # rounding residue must not make a constant series look like a transient
    floor = 1e-12 * float(np.max(means**2))
    best = int(np.argmin(np.maximum(error[: half + 1], floor)))
    return best * 5, best < half


def slope_t(times: ArrayLike, values: ArrayLike) -> tuple[float, float]:
    """Least-squares slope of values over times, and its t statistic (0 when undefined)."""
    x, y = np.asarray(times, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.size < 4 or float(np.ptp(x)) == 0.0:
        return 0.0, 0.0
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    residual = y - y.mean() - slope * centred
    error = math.sqrt(float(residual @ residual) / (x.size - 2) / float(centred @ centred))
    return slope, slope / error if error > 0 else math.copysign(math.inf, slope) if slope else 0.0


def block_length(n: int) -> int:
    """Block length of the bootstraps: the usual n ** (1/3) rate, at least 1."""
    return max(1, round(n ** (1 / 3)))


def block_bootstrap(
    values: ArrayLike, replicates: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Circular moving-block bootstrap samples of values in time order.

    Returns:
        [replicates, len(values)].
    """
    series = np.asarray(values, dtype=np.float64)
    n, length = series.size, block_length(series.size)
    starts = generator.integers(0, n, size=(replicates, math.ceil(n / length)))
    index = (starts[:, :, None] + np.arange(length)) % n
    return series[index.reshape(replicates, -1)[:, :n]]
