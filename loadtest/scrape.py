"""Reads a server's Prometheus page beside the load.

Keeps what explains latency: gauges as they are, counters as rates, the mean of each histogram
between two looks. Knows the text format; knows no server's metric names but the noise to skip.
"""

from __future__ import annotations

import asyncio
import re
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING

from .http import ConnectError, ConnectionLostError, ProtocolError
from .result import ServerMetric

if TYPE_CHECKING:
    from .http import Pool

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*")
_NOISE = ("python_", "process_", "http_")
_MAX_SERIES = 60


def parse_metrics(text: str) -> tuple[dict[str, float], dict[str, str]]:
    """Sums each metric over its labels.

    Returns:
        (value by name, kind by name: gauge, counter, histogram, ...). Histograms appear as their
        `_sum` and `_count`.
    """
    kinds: dict[str, str] = {}
    values: dict[str, float] = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = [*line.split(None, 3), ""][:4]
            kinds[name] = kind
            continue
        if line.startswith("#") or not line.strip():
            continue
        match = _SAMPLE.fullmatch(line)
        if match is None:
            continue
        name, labels, number = match.groups()
        if name.startswith(_NOISE) or name.endswith("_created") or "le=" in (labels or ""):
            continue
        try:
            values[name] = values.get(name, 0.0) + float(number)
        except ValueError:
            continue
    return values, kinds


class Scraper:
    """Looks at /metrics every `period` seconds until cancelled."""

    def __init__(self, pool: Pool, period: float = 0.5) -> None:
        self._pool = pool
        self._period = period
        self._looks: list[tuple[float, dict[str, float]]] = []
        self._kinds: dict[str, str] = {}
        self.latest: dict[str, float] = {}

    async def run(self) -> None:
        """Returns at once where the server has no /metrics."""
        while True:
            begin = perf_counter()
            try:
                status, _, body = await self._pool.fetch("GET", "/metrics")
            except (ConnectError, ConnectionLostError, ProtocolError):
                await asyncio.sleep(self._period)
                continue
            if status != 200:
                return
            self.latest, kinds = parse_metrics(body.decode("utf-8", "replace"))
            self._kinds.update(kinds)
            self._looks.append(((begin + perf_counter()) / 2, self.latest))
            await asyncio.sleep(max(self._period - (perf_counter() - begin), 0.05))

    def series(self, origin: float) -> list[ServerMetric]:
        """What was seen, on the run's clock; series that never changed from 0 are left out."""
        found: list[ServerMetric] = []
        looks = [(time - origin, values) for time, values in self._looks]
        for name in sorted({name for _, values in looks for name in values}):
            at = [(time, values[name]) for time, values in looks if name in values]
            if len(at) < 2 or not any(value for _, value in at):
                continue
            if name.endswith("_sum") and f"{name[:-4]}_count" in looks[-1][1]:
                mean = self._means(looks, name[:-4])
                if mean is not None:
                    found.append(mean)
            elif name.endswith("_count") and f"{name[:-6]}_sum" in looks[-1][1]:
                continue
            elif self._is_counter(name):
                rates = [
                    (t1, max(v1 - v0, 0.0) / (t1 - t0))
                    for (t0, v0), (t1, v1) in pairwise(at)
                    if t1 > t0
                ]
                if any(rate for _, rate in rates):
                    found.append(_metric(name, "counter", rates))
            else:
                found.append(_metric(name, "gauge", at))
        return found[:_MAX_SERIES]

    def _is_counter(self, name: str) -> bool:
        return "counter" in (self._kinds.get(name), self._kinds.get(name.removesuffix("_total")))

    def _means(self, looks: list[tuple[float, dict[str, float]]], base: str) -> ServerMetric | None:
        points = []
        for (_, before), (time, after) in pairwise(looks):
            if f"{base}_count" not in before or f"{base}_count" not in after:
                continue
            new = after[f"{base}_count"] - before[f"{base}_count"]
            if new > 0:
                points.append((time, (after[f"{base}_sum"] - before[f"{base}_sum"]) / new))
        return _metric(f"{base} (mean)", "gauge", points) if len(points) > 1 else None


def _metric(name: str, kind: str, points: list[tuple[float, float]]) -> ServerMetric:
    return ServerMetric(
        name=name,
        kind="counter" if kind == "counter" else "gauge",
        times=[round(time, 3) for time, _ in points],
        values=[value for _, value in points],
    )
