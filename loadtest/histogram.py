"""A mergeable high-dynamic-range histogram of durations.

Log-linear buckets: one per microsecond up to 2 ms, then 1024 per power of two, so any value from
1 us to two hours is kept within 0.1 %. Histograms of worker processes, of time slices, or of runs
on other machines add up exactly. Knows nothing of requests.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_UNIT = 1e-6
_HALF_BITS = 10
_HALF = 1 << _HALF_BITS
_MAX_SHIFT = 22
_SIZE = (_MAX_SHIFT + 2) * _HALF
_LARGEST = float((2 * _HALF - 1) << _MAX_SHIFT)


def _index(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    units = np.clip(np.rint(seconds / _UNIT), 0.0, _LARGEST)
    bits = np.frexp(units)[1]  # the bit length of the integer
    shift = np.maximum(bits - (_HALF_BITS + 1), 0).astype(np.int64)
    return shift * _HALF + (units.astype(np.int64) >> shift)


def _bounds(index: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    shift = np.maximum(index // _HALF - 1, 0)
    low = (index - shift * _HALF) << shift
    high = low + (np.int64(1) << shift)
    return low.astype(np.float64) * _UNIT, high.astype(np.float64) * _UNIT


def bucket_values(index: NDArray[np.int64]) -> NDArray[np.float64]:
    """The duration each bucket stands for: its middle, or the one microsecond value it holds."""
    low, high = _bounds(index)
    return np.where(high - low < 1.5 * _UNIT, low, (low + high) / 2)


class Histogram:
    """Counts of durations in seconds, 1 us to about 2 hours (larger values saturate)."""

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(_SIZE, dtype=np.int64)

    @classmethod
    def of(cls, seconds: ArrayLike) -> Histogram:
        histogram = cls()
        histogram.record(seconds)
        return histogram

    def record(self, seconds: ArrayLike) -> None:
        """Adds each duration; negative ones count as 0."""
        values = np.asarray(seconds, dtype=np.float64).ravel()
        if values.size:
            self.counts += np.bincount(_index(values), minlength=_SIZE)

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def percentile(self, q: float) -> float | None:
        """The value below which a share q (0..1) lies, within 0.1 %; None when empty."""
        total = self.total
        if not total:
            return None
        rank = min(max(int(np.ceil(q * total)), 1), total)
        index = np.searchsorted(np.cumsum(self.counts), rank)
        return float(bucket_values(np.asarray([index], dtype=np.int64))[0])

    def mean(self) -> float | None:
        used = np.flatnonzero(self.counts)
        if not used.size:
            return None
        return float(np.average(bucket_values(used), weights=self.counts[used]))

    def to_sparse(self) -> list[tuple[int, int]]:
        """(bucket, count) pairs of the buckets in use; `from_sparse` undoes it."""
        used = np.flatnonzero(self.counts)
        return list(zip(used.tolist(), self.counts[used].tolist(), strict=True))

    @classmethod
    def from_sparse(cls, pairs: list[tuple[int, int]]) -> Histogram:
        histogram = cls()
        for index, count in pairs:
            histogram.counts[index] += count
        return histogram
