"""Finds what a server can carry: brackets its capacity, then draws latency against load.

First users are doubled until throughput no longer grows (closed loop), then Poisson arrivals are
tried at shares of that capacity (open loop), where latency is honest. The knee is found twice: by
curvature, narrowed by a rate on either side of it, and as the highest rate at which enough requests
are good. A point whose client was the bottleneck is measured once more. Runs loads; draws nothing.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from .run import probe, run
from .scenario import Scenario  # noqa: TC001 decoded by type
from .stats import slope_t

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .result import Result
    from .run import Probe, Settings
    from .worker import Progress

SCHEMA = "convserve.loadtest.sweep/1"

_SHARES = (0.2, 0.4, 0.6, 0.75, 0.9, 1.0, 1.1)
_GAIN = 1.05
"""Doubling the users must raise throughput by this, or capacity is reached."""


class SweepOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How far and how finely to look."""

    duration: float = 20.0
    """Seconds of sending at each point."""
    max_concurrency: int = 256
    rates: list[float] = []
    """Open-loop rates; empty for shares of the capacity found."""
    goodput: float = 0.99
    """Share of good requests that a rate must keep."""
    bisections: int = 4


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One load and what came of it; seconds, per second, shares."""

    label: str
    kind: Literal["closed", "open"]
    level: float
    """Users, or arrivals per second."""
    requests: int
    request_rate: float
    output_token_rate: float
    ttft_p50: float | None
    ttft_p99: float | None
    e2e_p50: float | None
    e2e_p99: float | None
    tpot_p50: float | None
    goodput: float | None
    goodput_low: float | None
    error_ratio: float
    valid: bool
    saturated: bool
    """In flight grew through the run, which was then cut short."""


class Sweep(msgspec.Struct, frozen=True, kw_only=True):
    """All points and what they say."""

    schema_: str = msgspec.field(name="schema", default=SCHEMA)
    kind: Literal["sweep"] = "sweep"
    started: str
    command: list[str]
    target: str
    model: str
    scenario: Scenario
    options: SweepOptions
    environment: dict[str, Any]
    server: dict[str, Any]
    points: list[Point]
    capacity: float | None
    """Requests per second that the closed loop reached at most."""
    knee: float | None
    """Open-loop rate of greatest curvature."""
    slo_rate: float | None
    """Highest rate whose goodput share was kept."""
    conclusions: list[str]

    @property
    def exit_code(self) -> int:
        return 0 if all(point.valid or point.saturated for point in self.points) else 2


class Saturation:
    """Watches a run and calls it off when requests in flight grow without end."""

    def __init__(self, interrupt: asyncio.Event) -> None:
        self._interrupt = interrupt
        self._times: list[float] = []
        self._levels: list[float] = []
        self._slots: dict[int, int] = {}
        self.found = False

    def update(self, progress: Progress, worker: int) -> None:
        """Takes one message of a worker."""
        self._slots[worker] = progress.in_flight
        self._times.append(progress.time)
        self._levels.append(float(sum(self._slots.values())))
        n = len(self._times)
        if self.found or n < 24 or self._times[-1] < 5.0:
            return
        recent, early = self._levels[n // 3 :], self._levels[: n // 4]
        _, t = slope_t(self._times[n // 3 :], recent)
        if t > 8 and self._levels[-1] > max(16.0, 3 * float(np.mean(early))):
            self.found = True
            self._interrupt.set()


def knee_of(rates: list[float], latencies: list[float]) -> float | None:
    """The rate where a rising latency curve bends most (Kneedle: the greatest distance below the
    chord, both axes scaled to 0..1). None with under 4 points or without a bend.

    Latency counts by its logarithm: beyond capacity it grows with the length of the run, and on a
    linear axis the last point alone would decide.
    """
    if len(rates) < 4:
        return None
    order = np.argsort(rates)
    x, y = np.array(rates)[order], np.log(np.array(latencies)[order])
    if np.ptp(x) == 0 or y[-1] - y[0] < math.log(1.2):
        return None
    distance = (x - x[0]) / (x[-1] - x[0]) - (y - y[0]) / (y[-1] - y[0])
    best = int(np.argmax(distance))
    return float(x[best]) if distance[best] > 0.1 else None


def _quantile(result: Result, figure: str, name: str) -> float | None:
    found = result.full.latency.get(figure)
    return None if found is None else found.percentiles[name].value


def _point(kind: Literal["closed", "open"], level: float, result: Result, saturated: bool) -> Point:
    best = result.steady if result.steady is not None and kind == "closed" else result.full
    share = result.full.goodput_ratio
    return Point(
        label=f"{level:g} users" if kind == "closed" else f"{level:.4g}/s",
        kind=kind,
        level=level,
        requests=result.full.requests,
        request_rate=best.rates["request_rate"].value,
        output_token_rate=best.rates["output_token_rate"].value,
        ttft_p50=_quantile(result, "ttft", "p50"),
        ttft_p99=_quantile(result, "ttft", "p99"),
        e2e_p50=_quantile(result, "e2e", "p50"),
        e2e_p99=_quantile(result, "e2e", "p99"),
        tpot_p50=_quantile(result, "tpot", "p50"),
        goodput=share.value if share else None,
        goodput_low=share.low if share else None,
        error_ratio=result.full.error_ratio,
        valid=result.audit.valid,
        saturated=saturated or (kind == "open" and _grew(result)),
    )


def _grew(result: Result) -> bool:
    """Whether requests in flight grew for as long as they were sent."""
    sending = result.scenario.load.max_duration or result.full.end
    line = result.timeline
    count = max(int(sending / line.width), 1)
    levels = line.in_flight[:count]
    slope, t = slope_t(line.times[:count], levels)
    return t > 4 and slope * sending > max(4.0, float(np.mean(levels)))


class _Sweeper:
    """Runs single points, keeping the results in order."""

    def __init__(
        self,
        scenario: Scenario,
        settings: Settings,
        options: SweepOptions,
        known: Probe,
        on_point: Callable[[Point, Result], None] | None,
        interrupt: asyncio.Event | None,
    ) -> None:
        self._scenario = scenario
        self._settings = settings
        self._options = options
        self._known = known
        self._on_point = on_point
        self._interrupt = interrupt
        self.points: list[Point] = []
        self.first: Result | None = None

    @property
    def stopped(self) -> bool:
        return self._interrupt is not None and self._interrupt.is_set()

    async def point(self, kind: Literal["closed", "open"], level: float) -> Point:
        """Measures one load; again if the client was not up to it the first time."""
        made, result = await self._measure(kind, level)
        if not (made.valid or made.saturated or self.stopped):
            made, result = await self._measure(kind, level)
        self.points.append(made)
        self.first = self.first or result
        if self._on_point is not None:
            self._on_point(made, result)
        return made

    async def _measure(self, kind: Literal["closed", "open"], level: float) -> tuple[Point, Result]:
        load = msgspec.structs.replace(
            self._scenario.load,
            strategy="concurrent" if kind == "closed" else "poisson",
            rate=None if kind == "closed" else level,
            concurrency=int(level) if kind == "closed" else None,
            stages=[],
            trace=None,
            max_in_flight=None,
            max_requests=None,
            max_duration=self._options.duration,
        )
        # its gates are those of whole runs
        rule = msgspec.structs.replace(self._scenario.stop, slo=False)
        scenario = msgspec.structs.replace(self._scenario, load=load, stop=rule)
        stop = asyncio.Event()
        watch = Saturation(stop)
        forward = asyncio.create_task(self._forward(stop)) if self._interrupt else None
        try:
            result, _ = await run(
                scenario,
                self._settings,
                known=self._known,
                on_progress=watch.update if kind == "open" else None,
                interrupt=stop,
            )
        finally:
            if forward is not None:
                forward.cancel()
        return _point(kind, level, result, watch.found), result

    async def _forward(self, stop: asyncio.Event) -> None:
        assert self._interrupt is not None
        await self._interrupt.wait()
        stop.set()

    async def capacity(self) -> float:
        """Doubles the users until that brings little; the best request rate."""
        best, users = 0.0, 1
        while users <= self._options.max_concurrency and not self.stopped:
            point = await self.point("closed", users)
            if point.request_rate < best * _GAIN:
                return max(best, point.request_rate)
            best = point.request_rate
            users *= 2
        return best

    def keeps(self, point: Point) -> bool:
        """Whether a point's goodput is high enough."""
        return (
            not point.saturated and point.goodput is not None
            and point.goodput >= self._options.goodput
        )  # fmt: skip

    async def narrow_knee(self) -> None:
        """Tries a rate on either side of the knee, half-way to its neighbours."""
        knee = curvature(self.points)
        if knee is None:
            return
        levels = sorted(p.level for p in self.points if p.kind == "open")
        place = levels.index(knee)
        for other in levels[max(place - 1, 0) : place] + levels[place + 1 : place + 2]:
            if not self.stopped:
                await self.point("open", (knee + other) / 2)

    async def bisect(self) -> float | None:
        """Narrows down the highest open-loop rate that keeps the goodput."""
        tried = sorted((p for p in self.points if p.kind == "open"), key=lambda p: p.level)
        kept = [p.level for p in tried if self.keeps(p)]
        lost = [p.level for p in tried if not self.keeps(p) and p.level > max(kept, default=0.0)]
        low, high = max(kept, default=0.0), min(lost, default=None)
        if high is None:
            return low or None
        for _ in range(self._options.bisections):
            if self.stopped or high - low < 0.02 * high:
                break
            middle = (low + high) / 2
            if self.keeps(await self.point("open", middle)):
                low = middle
            else:
                high = middle
        return low or None


async def sweep(
    scenario: Scenario,
    settings: Settings,
    options: SweepOptions,
    *,
    on_point: Callable[[Point, Result], None] | None = None,
    interrupt: asyncio.Event | None = None,
) -> Sweep:
    """Measures the curve.

    Raises:
        RunError: the server does not answer.
    """
    known = await probe(settings, scenario)
    sweeper = _Sweeper(scenario, settings, options, known, on_point, interrupt)
    capacity = None
    rates, rates_given = sorted(options.rates), bool(options.rates)
    if not rates_given:
        capacity = await sweeper.capacity()
        rates = [share * capacity for share in _SHARES]
    for rate in rates:
        if sweeper.stopped or (await sweeper.point("open", rate)).saturated:
            break
    if not rates_given:
        await sweeper.narrow_knee()
    slo_rate = await sweeper.bisect() if scenario.goodput and not sweeper.stopped else None
    knee = curvature(sweeper.points)
    first = sweeper.first
    assert first is not None
    return Sweep(
        started=first.started,
        command=settings.command,
        target=settings.url,
        model=known.model,
        scenario=scenario,
        options=options,
        environment=first.environment,
        server=first.server,
        points=sweeper.points,
        capacity=capacity,
        knee=knee,
        slo_rate=slo_rate,
        conclusions=_conclusions(capacity, knee, slo_rate, options, bool(scenario.goodput)),
    )


def curvature(points: list[Point]) -> float | None:
    """The knee of the open-loop points whose client kept up, by E2E p99 or, failing it, p50."""
    opened = [p for p in points if p.kind == "open" and p.valid]
    for name in ("e2e_p99", "e2e_p50"):
        values = [getattr(p, name) for p in opened]
        if len(values) >= 4 and None not in values:
            return knee_of([p.level for p in opened], values)
    return None


def _conclusions(
    capacity: float | None,
    knee: float | None,
    slo_rate: float | None,
    options: SweepOptions,
    limited: bool,
) -> list[str]:
    lines = []
    if capacity is not None:
        lines.append(f"capacity: {capacity:.4g} requests/s (closed loop)")
    lines.append(
        f"knee by curvature: {knee:.4g} requests/s" if knee else "knee by curvature: no bend found"
    )
    if limited:
        lines.append(
            f"highest rate with goodput >= {options.goodput:.1%}: {slo_rate:.4g} requests/s"
            if slo_rate
            else f"no rate kept goodput >= {options.goodput:.1%}"
        )
    return lines


def read_sweep(path: Path) -> Sweep:
    """Reads a sweep's JSON. Raises ValueError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Sweep)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"{path}: not a sweep: {error}") from error
    if found.schema_ != SCHEMA:
        raise ValueError(f"{path}: schema {found.schema_!r} (this program reads {SCHEMA!r})")
    return found
