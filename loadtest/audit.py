"""Was the client itself the bottleneck? Then its latency figures say nothing about the server.

Knows records and what the workers noticed about themselves; knows nothing of the server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from .figures import ttft

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .records import AuditSample, RequestRecord


class AuditLimits(msgspec.Struct, frozen=True, kw_only=True):
    """When a run is invalid; times in seconds."""

    share: float = 0.1
    """Lag may be this share of the median TTFT ..."""
    send_lag: float = 0.002
    """... or this much, whichever is more (99th percentile)."""
    loop_lag: float = 0.010
    """The same for the event loop's lag."""
    cpu: float = 0.85
    """Cores a single-threaded worker may use."""


class Audit(msgspec.Struct, frozen=True, kw_only=True):
    """The client's own figures; seconds, and shares of one core per worker."""

    valid: bool
    reasons: list[str]
    """Why the run is invalid."""
    warnings: list[str]
    send_lag_p50: float
    send_lag_p99: float
    send_lag_max: float
    loop_lag_p50: float
    loop_lag_p99: float
    loop_lag_max: float
    cpu: float
    """Of the busiest worker."""
    parse: float
    """Share of time the busiest worker spent on decoding."""
    workers: int
    limits: AuditLimits


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if not len(values):
        return 0.0, 0.0, 0.0
    p50, p99, top = np.quantile(np.asarray(values), [0.5, 0.99, 1.0])
    return float(p50), float(p99), float(top)


def audit(
    records: Sequence[RequestRecord],
    samples: Sequence[AuditSample],
    limits: AuditLimits | None = None,
) -> Audit:
    """Judges the client of a run."""
    limits = limits or AuditLimits()
    load = [record for record in records if record.kind == "load"]
    send = _spread([max(record.dispatched - record.intended, 0.0) for record in load])
    loop = _spread([lag for sample in samples for lag in sample.loop_lag])
    cpu = max((s.cpu_seconds / s.wall_seconds for s in samples if s.wall_seconds), default=0.0)
    parse = max((s.parse_seconds / s.wall_seconds for s in samples if s.wall_seconds), default=0.0)
    typical = _spread([value for record in load if (value := ttft(record)) is not None])[0]
    reasons, warnings = [], []
    for name, lag, floor in (
        ("sends were late", send[1], limits.send_lag),
        ("the client's event loop was late", loop[1], limits.loop_lag),
    ):
        bound = max(floor, limits.share * typical)
        text = f"{name}: p99 {lag * 1e3:.2f} ms, allowed {bound * 1e3:.2f} ms"
        if lag > bound:
            reasons.append(text)
        elif lag > bound / 2:
            warnings.append(text)
    if cpu > limits.cpu:
        reasons.append(f"a client process used {cpu:.0%} of a core, allowed {limits.cpu:.0%}")
    elif cpu > limits.cpu * 0.75:
        warnings.append(f"a client process used {cpu:.0%} of a core; consider --workers")
    if load and not any(record.completed or record.outcome == "cancelled" for record in load):
        reasons.append("no request succeeded")
    if not load:
        reasons.append("no request was sent")
    return Audit(
        valid=not reasons,
        reasons=reasons,
        warnings=warnings,
        send_lag_p50=send[0],
        send_lag_p99=send[1],
        send_lag_max=send[2],
        loop_lag_p50=loop[0],
        loop_lag_p99=loop[1],
        loop_lag_max=loop[2],
        cpu=cpu,
        parse=parse,
        workers=len(samples),
        limits=limits,
    )
