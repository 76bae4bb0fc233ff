"""The definitions: from request records to TTFT, ITL, TPOT, E2E, rates and goodput.

Every name here is the name in the JSON and in docs/loadtest.md. Knows nothing of files or output.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from .stats import Distribution, Estimate, distribution, student_t, wilson

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .limits import Limit
    from .records import RequestRecord

RATE_BATCHES = 20


def ttft(record: RequestRecord) -> float | None:
    """Time to first token, from the intended send."""
    return None if record.first_token is None else record.first_token - record.intended


def ttft_service(record: RequestRecord) -> float | None:
    """Time to first token, from the bytes going out."""
    if record.first_token is None or record.sent is None:
        return None
    return record.first_token - record.sent


def e2e(record: RequestRecord) -> float | None:
    """Intended send to the end of a complete answer."""
    return record.end - record.intended if record.completed else None


def e2e_service(record: RequestRecord) -> float | None:
    return record.end - record.sent if record.completed and record.sent is not None else None


def send_gap(record: RequestRecord) -> float | None:
    """Intended send to the bytes going out: queueing in the client, connecting, retries."""
    return None if record.sent is None else record.sent - record.intended


def tpot(record: RequestRecord) -> float | None:
    """Time per output token after the first."""
    n = record.output_tokens
    if not record.completed or n is None or n < 2:
        return None
    if record.first_token is None or record.last_token is None:
        return None
    return (record.last_token - record.first_token) / (n - 1)


def ntpot(record: RequestRecord) -> float | None:
    """End-to-end time per output token."""
    whole = e2e(record)
    return whole / record.output_tokens if whole is not None and record.output_tokens else None


def itl_max(record: RequestRecord) -> float | None:
    """The longest pause between two chunks of one request."""
    offsets = record.chunk_offsets()
    return float(np.max(np.diff(offsets))) / 1e6 if len(offsets) > 1 else None


def server_queue(record: RequestRecord) -> float | None:
    return record.server_queue


def server_ttft(record: RequestRecord) -> float | None:
    return record.server_ttft


PER_REQUEST: dict[str, Callable[[RequestRecord], float | None]] = {
    "ttft": ttft,
    "ttft_service": ttft_service,
    "e2e": e2e,
    "e2e_service": e2e_service,
    "tpot": tpot,
    "ntpot": ntpot,
    "itl_max": itl_max,
    "send_gap": send_gap,
    "server_queue": server_queue,
    "server_ttft": server_ttft,
}
"""Figures of which each request has at most one."""


def itl_samples(record: RequestRecord) -> tuple[NDArray[np.float64], int]:
    """Inter-token latencies of one request, and how many of them are exact.

    The gap before a chunk of k tokens counts as k samples of gap / k, which are exact for k = 1
    only. The tokens of the first chunk have no gap.
    """
    offsets = np.frombuffer(record.chunk_us, dtype=np.uint32).astype(np.float64)
    counts = np.frombuffer(record.chunk_tokens, dtype=np.uint16).astype(np.int64)[1:]
    if record.basis == "unknown" or offsets.size < 2:
        return np.zeros(0), 0
    gaps = np.diff(offsets) / 1e6
    return np.repeat(gaps / counts, counts), int(np.count_nonzero(counts == 1))


def token_arrivals(
    records: Sequence[RequestRecord],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(times, weights) of all output tokens; where chunks hide them, a request's total is spread
    evenly over its chunks."""
    times, weights = [np.zeros(0)], [np.zeros(0)]
    for record in records:
        offsets = np.frombuffer(record.chunk_us, dtype=np.uint32)
        if not offsets.size:
            continue
        if record.basis == "unknown":
            total = record.output_tokens if record.output_tokens is not None else offsets.size
            weight = np.full(offsets.size, total / offsets.size)
        else:
            weight = np.frombuffer(record.chunk_tokens, dtype=np.uint16).astype(np.float64)
        times.append(record.intended + offsets / 1e6)
        weights.append(weight)
    return np.concatenate(times), np.concatenate(weights)


def in_flight(records: Sequence[RequestRecord], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Requests between dispatch and end at each time."""
    starts = np.sort([record.dispatched for record in records])
    ends = np.sort([record.end for record in records])
    right = np.searchsorted(starts, times, side="right") - np.searchsorted(ends, times, "right")
    return right.astype(np.float64)


def _mean_in_flight(
    records: Sequence[RequestRecord], edges: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Requests in flight on average between each two edges, exactly."""
    begin = np.array([record.dispatched for record in records])
    end = np.array([record.end for record in records])
    served = np.array([np.clip(np.minimum(edge, end) - begin, 0.0, None).sum() for edge in edges])
    return np.diff(served) / np.diff(edges)


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured over one window of the run."""

    start: float
    end: float
    requests: int
    """Intended within the window."""
    completed: int
    failed: int
    cancelled: int
    error_ratio: float
    error_ratio_low: float
    error_ratio_high: float
    latency: dict[str, Distribution]
    """By name; requests are the unit, but for `itl`, whose unit is the token."""
    refused: dict[str, str]
    """Figures that would mislead, and why they are not given."""
    itl_exact_ratio: float | None
    """Share of inter-token latencies whose token came alone in its chunk."""
    basis: dict[str, int]
    """Requests by how their tokens were counted."""
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    rates: dict[str, Estimate]
    """Per second: request_rate, output_token_rate, prompt_token_rate, goodput_rate."""
    concurrency: Estimate
    """Requests in flight."""
    goodput_ratio: Estimate | None
    """Share of requests that met every limit; None when no limit is set."""


def _rate(
    times: NDArray[np.float64], weights: NDArray[np.float64] | None, start: float, end: float
) -> Estimate:
    """Events per second with an interval from equal slices of the window."""
    edges = np.linspace(start, end, RATE_BATCHES + 1)
    slices = np.histogram(times, edges, weights=weights)[0] / (edges[1] - edges[0])
    value = float(slices.mean())
    half = student_t(RATE_BATCHES - 1) * float(slices.std(ddof=1)) / math.sqrt(RATE_BATCHES)
    return Estimate(value=value, low=max(value - half, 0.0), high=value + half)


def figures(
    records: Sequence[RequestRecord], start: float, end: float, limits: Sequence[Limit] = ()
) -> Figures:
    """Figures of the window [start, end), in which requests count by their intended time and
    tokens and completions by their own.

    Args:
        records: of the whole run, in any order; canaries are left out.
        limits: what makes a request count as good.
    """
    load = sorted((r for r in records if r.kind == "load"), key=lambda r: r.intended)
    inside = [r for r in load if start <= r.intended < end]
    timed = [r for r in inside if not r.slow_reader]
    latency: dict[str, Distribution] = {}
    for name, figure in PER_REQUEST.items():
        values = [value for r in timed if (value := figure(r)) is not None]
        if values:
            latency[name] = distribution(values)
    refused: dict[str, str] = {}
    basis = Counter(r.basis for r in timed if r.chunk_us)
    exact_ratio = None
    if basis["unknown"]:
        refused["itl"] = (
            f"chunks hide tokens in {basis['unknown']} of {basis.total()} requests "
            "(no token ids, no running usage, more tokens than chunks); tpot stands"
        )
    else:
        samples = [itl_samples(r) for r in timed]
        pooled = np.concatenate([np.zeros(0), *(gaps for gaps, _ in samples)])
        if pooled.size:
            latency["itl"] = distribution(pooled)
            exact_ratio = sum(exact for _, exact in samples) / pooled.size
    failed = sum(r.failed for r in inside)
    low, high = wilson(failed / len(inside), len(inside)) if inside else (0.0, 1.0)
    token_times, token_weights = token_arrivals(load)
    done = [r for r in load if r.completed]
    ends = np.array([r.end for r in done])
    good = [r for r in inside if _is_good(r, limits)]
    rates = {
        "request_rate": _rate(ends, None, start, end),
        "output_token_rate": _rate(token_times, token_weights, start, end),
        "prompt_token_rate": _rate(
            ends, np.array([float(r.prompt_tokens or 0) for r in done]), start, end
        ),
    }
    if limits:
        good_ends = np.array([r.end for r in done if _is_good(r, limits)])
        rates["goodput_rate"] = _rate(good_ends, None, start, end)
    levels = _mean_in_flight(load, np.linspace(start, end, RATE_BATCHES + 1))
    half = student_t(RATE_BATCHES - 1) * float(levels.std(ddof=1)) / math.sqrt(RATE_BATCHES)
    return Figures(
        start=start,
        end=end,
        requests=len(inside),
        completed=sum(r.completed for r in inside),
        failed=failed,
        cancelled=sum(r.outcome == "cancelled" for r in inside),
        error_ratio=failed / len(inside) if inside else 0.0,
        error_ratio_low=low,
        error_ratio_high=high,
        latency=latency,
        refused=refused,
        itl_exact_ratio=exact_ratio,
        basis=dict(basis),
        output_tokens=sum(r.output_tokens or 0 for r in inside),
        prompt_tokens=sum(r.prompt_tokens or 0 for r in inside),
        cached_tokens=sum(r.cached_tokens or 0 for r in inside),
        rates=rates,
        concurrency=Estimate(
            value=float(levels.mean()),
            low=float(levels.mean()) - half,
            high=float(levels.mean()) + half,
        ),
        goodput_ratio=_share(len(good), len(inside)) if limits and inside else None,
    )


def _share(part: int, whole: int) -> Estimate:
    low, high = wilson(part / whole, whole)
    return Estimate(value=part / whole, low=low, high=high)


def _is_good(record: RequestRecord, limits: Sequence[Limit]) -> bool:
    """Complete, and within every limit; a planned cancellation is judged by what it shows."""
    if record.failed:
        return False
    for limit in limits:
        value = PER_REQUEST[limit.figure](record)
        if value is None:
            if record.completed:
                continue
            if record.outcome == "cancelled" and limit.figure not in ("ttft", "ttft_service"):
                continue
            return False
        if not limit.allows(value):
            return False
    return True
