"""When requests are meant to be sent: computed before the load begins, never adjusted to it.

Arrivals at any rate profile are arrivals at unit rate (constant, Poisson or gamma gaps) pushed
through the inverse of the profile's cumulative rate, so ramps, steps and bursts are one mechanism.
Knows nothing of sending.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Gaps = Literal["constant", "poisson", "gamma"]


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A span of the load at one level, or gliding from `level` to `to`.

    A level is arrivals per second in an open loop and users in a closed one.
    """

    duration: float
    level: float
    to: float | None = None

    @property
    def end_level(self) -> float:
        return self.level if self.to is None else self.to

    @classmethod
    def parse_all(cls, text: str) -> list[Stage]:
        """Reads `30s:5,30s:5-20` (durations in seconds, or with m or h).

        Raises:
            ValueError
        """
        stages = []
        for part in text.split(","):
            span, _, levels = part.strip().partition(":")
            low, dash, high = levels.partition("-")
            try:
                stages.append(
                    cls(
                        duration=parse_duration(span),
                        level=float(low),
                        to=float(high) if dash else None,
                    )
                )
            except ValueError as error:
                raise ValueError(
                    f"stages: {part!r} is not DURATION:LEVEL or DURATION:FROM-TO"
                ) from error
        return stages


def parse_duration(text: str | float) -> float:
    """Seconds from `90`, `90s`, `1.5m` or `2h`.

    Raises:
        ValueError
    """
    if isinstance(text, str) and text[-1:] in ("s", "m", "h"):
        return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]
    return float(text)


def check_stages(stages: list[Stage]) -> None:
    """Raises ValueError for spans or levels that cannot be."""
    for number, stage in enumerate(stages):
        levels = (stage.level, stage.end_level)
        if not (stage.duration > 0 and min(levels) >= 0 and math.isfinite(sum(levels))):
            raise ValueError(f"stages[{number}]: needs a duration > 0 and finite levels >= 0")
    if not any(stage.level or stage.end_level for stage in stages):
        raise ValueError("stages: every level is 0")


def _unit_gaps(
    gaps: Gaps, burstiness: float, count: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    if gaps == "constant":
        return np.ones(count)
    if gaps == "poisson":
        return generator.exponential(1.0, count)
    return generator.gamma(burstiness, 1.0 / burstiness, count)


def schedule(
    gaps: Gaps,
    stages: list[Stage],
    generator: np.random.Generator,
    *,
    burstiness: float = 1.0,
    max_requests: int | None = None,
) -> NDArray[np.float64]:
    """Arrival times in seconds from the start, increasing, all within the stages.

    Args:
        burstiness: shape of the gamma gaps; 1 is Poisson, less is burstier, more is steadier.
        max_requests: stops after this many.
    """
    areas = [stage.duration * (stage.level + stage.end_level) / 2 for stage in stages]
    total = sum(areas)
    limit = math.inf if max_requests is None else max_requests
    found: list[NDArray[np.float64]] = []
    have, mass = 0, 0.0
    while mass < total and have < limit:
        batch = _unit_gaps(gaps, burstiness, 4096, generator)
        if gaps == "constant" and not found:
            batch[0] = 0.0
        marks = mass + np.cumsum(batch)
        mass = float(marks[-1])
        marks = marks[marks < total]
        found.append(marks)
        have += marks.size
    marks = np.concatenate(found) if found else np.zeros(0)
    if max_requests is not None:
        marks = marks[:max_requests]
    return _invert(marks, stages, areas)


def _invert(
    marks: NDArray[np.float64], stages: list[Stage], areas: list[float]
) -> NDArray[np.float64]:
    """Solves area(t) = mark: a quadratic within the stage that holds the mark."""
    times = np.empty_like(marks)
    begin, before = 0.0, 0.0
    for stage, area in zip(stages, areas, strict=True):
        inside = (marks >= before) & (marks < before + area)
        need = marks[inside] - before
        slope = (stage.end_level - stage.level) / stage.duration
        if slope == 0.0:
            local = need / stage.level if stage.level else need
        else:
            root = np.sqrt(np.maximum(stage.level**2 + 2 * slope * need, 0.0))
            local = 2 * need / np.maximum(stage.level + root, 1e-300)
        times[inside] = begin + local
        begin += stage.duration
        before += area
    return times


def level_at(stages: list[Stage], time: float) -> float:
    """The level of the stages at a time; 0 after their end."""
    for stage in stages:
        if time < stage.duration:
            return stage.level + (stage.end_level - stage.level) * time / stage.duration
        time -= stage.duration
    return 0.0
