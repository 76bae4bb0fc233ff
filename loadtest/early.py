"""Ends a load when more of it would tell nothing: its intervals are tight, or a gate is lost.

Judges the progress messages of the workers while they load: histograms by time, from which
intervals follow as they do in the report (batch means of "value <= percentile"). Knows nothing of
processes; whoever feeds it asks for `reason`.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

import numpy as np

from .histogram import bucket_values
from .limits import parse_gates
from .stats import min_samples, student_t, wilson

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .limits import Limit
    from .scenario import Scenario
    from .worker import Progress

WATCHED = ("ttft", "itl", "tpot", "e2e")
DEFAULT = ("ttft.p50", "itl.p50", "e2e.p50")

_MIN_SLICES = 20
_MAX_SLICES = 240
_GROUPS = (10, 30)
_IN_A_ROW = 3
"""Looks that must agree: one look of many would find a tight interval by chance."""
_MIN_REQUESTS = 30


def parse_figure(text: str) -> tuple[str, float]:
    """(figure, q) of `ttft.p99`. Raises ValueError."""
    match = re.fullmatch(rf"({'|'.join(WATCHED)})\.p(50|75|90|95|99|99\.9)", text)
    if match is None:
        raise ValueError(
            f"stop.figures: {text!r} is not one of {', '.join(WATCHED)} with .p50, .p75, .p90, "
            ".p95, .p99 or .p99.9"
        )
    return match[1], float(match[2]) / 100


def check_stop(scenario: Scenario) -> None:
    """Raises ValueError for a rule that could never end a load."""
    stop = scenario.stop
    for text in stop.figures:
        parse_figure(text)
    if stop.width is not None and not 0 < stop.width < 1:
        raise ValueError(f"stop.width: {stop.width:g} (a share between 0 and 1)")
    if stop.slo and not any(map(_is_watchable, parse_gates(scenario.slo))):
        raise ValueError(
            f"stop.slo: needs a gate on error or on a percentile of {', '.join(WATCHED)}"
        )


def _is_watchable(gate: Limit) -> bool:
    quantile = gate.figure in WATCHED and (gate.statistic or "").startswith("p")
    return (quantile or gate.figure == "error") and gate.comparison.startswith("<")


def interval(slices: list[dict[int, int]], q: float) -> tuple[float, float, float] | None:
    """(percentile q, low, high) in seconds of histograms in time order, with a 95 % interval.

    None with fewer values than a distribution-free interval takes, or under 20 slices.
    """
    whole: dict[int, int] = {}
    for piece in slices:
        for bucket, count in piece.items():
            whole[bucket] = whole.get(bucket, 0) + count
    total = sum(whole.values())
    if len(slices) < _MIN_SLICES or total < max(min_samples(q), _MIN_REQUESTS):
        return None
    buckets = np.array(sorted(whole))
    ends = np.cumsum([whole[bucket] for bucket in buckets.tolist()])

    def at(share: float) -> int:
        rank = min(max(math.ceil(share * total), 1), total)
        return int(buckets[np.searchsorted(ends, rank)])

    place = at(q)
    sizes = np.array([sum(piece.values()) for piece in slices], dtype=np.float64)
    below = np.array(
        [sum(n for bucket, n in piece.items() if bucket <= place) for piece in slices],
        dtype=np.float64,
    )
    groups = min(max(len(slices) // 8, _GROUPS[0]), _GROUPS[1])
    excess = _sums(below, groups) - below.sum() / total * _sums(sizes, groups)
    variance = groups / (groups - 1) * float(excess @ excess) / total**2
    inflation = max(1.0, variance * total / (q * (1 - q)))
    low, high = wilson(q, total / inflation, student_t(groups - 1))
    values = bucket_values(np.array([place, at(low), at(high)]))
    return float(values[0]), float(values[1]), float(values[2])


def _sums(values: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    return np.array([part.sum() for part in np.array_split(values, groups)])


class EarlyStop:
    """Takes progress in and has a `reason` once the load may end."""

    def __init__(self, scenario: Scenario) -> None:
        stop = scenario.stop
        self.reason: str | None = None
        self._width = stop.width
        self._figures = [parse_figure(text) for text in stop.figures or DEFAULT]
        gates = parse_gates(scenario.slo) if stop.slo else []
        self._gates = [gate for gate in gates if _is_watchable(gate)]
        self._slices: dict[str, list[dict[int, int]]] = {name: [] for name in WATCHED}
        self._ended = self._failed = 0
        self._agreed = 0
        self._last = ""

    def update(self, progress: Progress, worker: int) -> None:
        """Takes what one worker did since its last message."""
        if self._width is None and not self._gates:
            return
        failed = sum(progress.failed.values())
        self._failed += failed
        self._ended += progress.completed + failed
        for name, slices in self._slices.items():
            slices.append(dict(progress.latency.get(name, ())))
            if len(slices) > _MAX_SLICES:
                slices[:] = [_merged(*slices[k : k + 2]) for k in range(0, len(slices), 2)]
        found = self._lost() or self._tight()
        self._agreed = self._agreed + 1 if found and found == self._last else int(bool(found))
        self._last = found
        if self._agreed >= _IN_A_ROW:
            self.reason = found

    def _lost(self) -> str:
        """A gate whose limit lies below the whole interval."""
        for gate in self._gates:
            if gate.figure == "error":
                if self._ended < _MIN_REQUESTS:
                    continue
                low = wilson(self._failed / self._ended, self._ended)[0]
            else:
                _, q = parse_figure(f"{gate.figure}.{gate.statistic}")
                found = interval(self._slices[gate.figure], q)
                if found is None:
                    continue
                low = found[1]
            if low > gate.bound:
                return f"{gate.text} is lost"
        return ""

    def _tight(self) -> str:
        """Every figure's interval is narrow enough."""
        if self._width is None:
            return ""
        for name, q in self._figures:
            found = interval(self._slices[name], q)
            if found is None:
                return ""
            value, low, high = found
            if max(value - low, high - value) > self._width * value:
                return ""
        return f"every interval is within {self._width:.3g} of its value"


def _merged(first: dict[int, int], *rest: dict[int, int]) -> dict[int, int]:
    whole = dict(first)
    for other in rest:
        for bucket, count in other.items():
            whole[bucket] = whole.get(bucket, 0) + count
    return whole
