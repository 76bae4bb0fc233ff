"""A run's result: the JSON that reports, comparisons and gates read.

The schema carries a version; names are those of docs/loadtest.md; times are seconds. Knows
nothing of how it is shown.
"""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from . import figures as fig
from .audit import Audit, audit
from .histogram import Histogram
from .limits import parse_gates, parse_limits
from .prompts import PromptPlan  # noqa: TC001 decoded by type
from .records import jsonl_row
from .scenario import Scenario  # noqa: TC001 decoded by type
from .slo import Verdict, judge
from .stats import mser5, slope_t

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from .audit import AuditLimits
    from .records import AuditSample, RequestRecord

SCHEMA = "convserve.loadtest/1"

_MIN_STEADY = 30
_ITL_BATCHES = 40


class FailureKind(msgspec.Struct, frozen=True, kw_only=True):
    """All failures of one kind."""

    count: int
    statuses: dict[str, int]
    median_time: float
    """Seconds from the intended send to the failure."""
    examples: list[str]


class CanaryOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Byte comparisons of the canary's answers."""

    sent: int
    matched: int
    mismatched: int
    failed: int


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """The run in equal slices; rates are per second."""

    width: float
    times: list[float]
    """Start of each slice."""
    launched: list[float]
    completed: list[float]
    failed: list[float]
    output_tokens: list[float]
    in_flight: list[float]
    ttft_p50: list[float | None]
    ttft_p99: list[float | None]


class HeatMap(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a latency by time slice and by logarithmic bin."""

    times: list[float]
    edges: list[float]
    counts: list[list[int]]
    """[time slice][latency bin]."""


class ServerMetric(msgspec.Struct, frozen=True, kw_only=True):
    """One series of the server's /metrics; counters are given as rates per second."""

    name: str
    kind: Literal["gauge", "counter"]
    times: list[float]
    values: list[float]


class Result(msgspec.Struct, kw_only=True):
    """Everything about one run."""

    schema_: str = msgspec.field(name="schema", default=SCHEMA)
    kind: Literal["run"] = "run"
    started: str
    """UTC, ISO 8601."""
    command: list[str]
    target: str
    model: str
    scenario: Scenario
    prompts: PromptPlan
    vendor_fields: bool
    environment: dict[str, Any]
    server: dict[str, Any]
    interrupted: bool
    audit: Audit
    full: fig.Figures
    """All of the measured load, until its last answer."""
    steady: fig.Figures | None
    """Without its beginning (MSER-5) and its end (after the last send)."""
    steady_note: str
    failures: dict[str, FailureKind]
    abandoned_turns: int
    retried: int
    early_stops: int
    """Answers that ended by `stop` although end-of-text was to be ignored."""
    canary: CanaryOutcome | None
    verdicts: list[Verdict]
    timeline: Timeline
    heat: dict[str, HeatMap]
    by_traffic: dict[str, fig.Figures]
    """Per class, when there is more than one."""
    itl_batches: list[list[tuple[int, int]]]
    """Inter-token latencies in up to 40 batches by time, as sparse histograms (they add up)."""
    requests: dict[str, list[Any]]
    """The requests as columns, by intended time; full records are in the JSONL."""
    server_metrics: list[ServerMetric] = []
    stopped: str | None = None
    """Why the load ended before its time, if a rule of `scenario.stop` ended it."""

    @property
    def exit_code(self) -> int:
        """0 fine, 1 a gate or a canary failed, 2 invalid or undecided."""
        if self.canary is not None and self.canary.mismatched:
            return 1
        if any(verdict.passed is False for verdict in self.verdicts):
            return 1 if self.audit.valid else 2
        if not self.audit.valid or any(verdict.passed is None for verdict in self.verdicts):
            return 2
        return 0


def _failures(records: Sequence[RequestRecord]) -> dict[str, FailureKind]:
    groups: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        if record.failed:
            groups[record.outcome].append(record)
    return {
        kind: FailureKind(
            count=len(group),
            statuses={str(k): v for k, v in Counter(r.status for r in group if r.status).items()},
            median_time=float(np.median([r.end - r.intended for r in group])),
            examples=sorted({r.message for r in group if r.message})[:3],
        )
        for kind, group in sorted(groups.items(), key=lambda item: -len(item[1]))
    }


def _steady(load: list[RequestRecord], limits: Sequence[Any]) -> tuple[fig.Figures | None, str]:
    good = [r for r in load if r.completed and not r.slow_reader]
    if len(good) < 2 * _MIN_STEADY:
        return None, f"needs {2 * _MIN_STEADY} completed requests, has {len(good)}"
    last = max(r.intended for r in load)
    starts = []
    for figure in (fig.ttft, fig.e2e):
        values = [value for r in good if (value := figure(r)) is not None]
        drop, found = mser5(values)
        if not found:
            return None, "none found: latency never settled (load beyond capacity, or too short)"
        starts.append(good[min(drop, len(good) - 1)].intended)
    start = max(starts)
    inside = sum(start <= r.intended < last for r in good)
    if inside < _MIN_STEADY:
        return None, f"only {inside} requests after the warm-up transient"
    grid = np.linspace(start, last, 60)
    levels = fig.in_flight(load, grid)
    slope, t = slope_t(grid, levels)
    growth = slope * (last - start)
    note = "found"
    if t > 4 and growth > max(3.0, 0.5 * float(levels.mean())):
        note = "the number in flight grew throughout: the load is beyond the server's capacity"
    return fig.figures(load, start, last, limits), note


def _timeline(load: list[RequestRecord], end: float) -> Timeline:
    slices = int(min(max(end, 10), 240))
    edges = np.linspace(0.0, end, slices + 1)
    width = float(edges[1])

    def rate(times: list[float], weights: Any = None) -> list[float]:
        return (np.histogram(times, edges, weights=weights)[0] / width).tolist()

    token_times, token_weights = fig.token_arrivals(load)
    first = [(r.intended, value) for r in load if (value := fig.ttft(r)) is not None]
    place = np.clip(np.digitize([t for t, _ in first], edges) - 1, 0, slices - 1)
    values = np.array([value for _, value in first])

    def quantile(q: float) -> list[float | None]:
        return [
            float(np.quantile(values[place == k], q)) if (place == k).any() else None
            for k in range(slices)
        ]

    return Timeline(
        width=width,
        times=edges[:-1].tolist(),
        launched=rate([r.intended for r in load]),
        completed=rate([r.end for r in load if r.completed]),
        failed=rate([r.end for r in load if r.failed]),
        output_tokens=rate(token_times.tolist(), token_weights),
        in_flight=fig.in_flight(load, (edges[:-1] + edges[1:]) / 2).tolist(),
        ttft_p50=quantile(0.5),
        ttft_p99=quantile(0.99),
    )


def _heat(times: Any, values: Any, end: float) -> HeatMap | None:
    positive = np.asarray(values) > 0
    times, values = np.asarray(times)[positive], np.asarray(values)[positive]
    if values.size < 2:
        return None
    low, high = float(values.min()), float(values.max())
    edges = np.geomspace(low * 0.999, max(high * 1.001, low * 1.5), 49)
    slices = np.linspace(0.0, max(end, 1e-6), int(min(max(end, 10), 120)) + 1)
    counts = np.histogram2d(times, values, bins=(slices, edges))[0].astype(int)
    return HeatMap(times=slices.tolist(), edges=edges.tolist(), counts=counts.tolist())


def _columns(load: list[RequestRecord]) -> dict[str, list[Any]]:
    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 6)

    columns: dict[str, list[Any]] = {}
    for name in (
        "intended",
        "dispatched",
        "sent",
        "first_byte",
        "first_token",
        "last_token",
        "end",
    ):
        columns[name] = [rounded(getattr(r, name)) for r in load]
    for name in ("index", "turn", "traffic", "outcome", "prompt_tokens", "cached_tokens",
                 "output_tokens", "slow_reader"):  # fmt: skip
        columns[name] = [getattr(r, name) for r in load]
    for name in ("ttft", "e2e", "tpot", "itl_max"):
        columns[name] = [rounded(fig.PER_REQUEST[name](r)) for r in load]
    return columns


def summarise(
    *,
    scenario: Scenario,
    records: Sequence[RequestRecord],
    samples: Sequence[AuditSample],
    prompts: PromptPlan,
    target: str,
    model: str,
    started: str,
    command: list[str],
    vendor_fields: bool = True,
    environment: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    abandoned_turns: int = 0,
    interrupted: bool = False,
    audit_limits: AuditLimits | None = None,
    server_metrics: list[ServerMetric] | None = None,
    stopped: str | None = None,
) -> Result:
    """Turns the records of one run into its result."""
    load = sorted((r for r in records if r.kind == "load"), key=lambda r: (r.intended, r.index))
    canaries = [r for r in records if r.kind == "canary"]
    limits = parse_limits(scenario.goodput)
    end = max((r.end for r in load), default=0.0) + 1e-6
    full = fig.figures(load, 0.0, end, limits)
    steady, steady_note = _steady(load, limits)
    heat: dict[str, HeatMap] = {}
    for name in ("ttft", "e2e"):
        pairs = [(r.intended, v) for r in load if (v := fig.PER_REQUEST[name](r)) is not None]
        if (made := _heat([t for t, _ in pairs], [v for _, v in pairs], end)) is not None:
            heat[name] = made
    batches: list[list[tuple[int, int]]] = []
    if "itl" in full.latency:
        gaps = [(r, fig.itl_samples(r)[0]) for r in load if not r.slow_reader]
        times = np.concatenate([np.full(g.size, r.end) for r, g in gaps])
        pooled = np.concatenate([g for _, g in gaps])
        if (made := _heat(times, pooled, end)) is not None:
            heat["itl"] = made
        groups = np.array_split(np.arange(len(gaps)), min(_ITL_BATCHES, len(gaps)))
        batches = [
            Histogram.of(np.concatenate([gaps[k][1] for k in group])).to_sparse()
            for group in groups
        ]
    names = sorted({r.traffic for r in load})
    canary = None
    if canaries:
        canary = CanaryOutcome(
            sent=len(canaries),
            matched=sum(r.canary_match is True for r in canaries),
            mismatched=sum(r.canary_match is False for r in canaries),
            failed=sum(r.failed for r in canaries),
        )
    return Result(
        started=started,
        command=command,
        target=target,
        model=model,
        scenario=scenario,
        prompts=prompts,
        vendor_fields=vendor_fields,
        environment=environment or {},
        server=server or {},
        interrupted=interrupted,
        audit=audit(records, samples, audit_limits),
        full=full,
        steady=steady,
        steady_note=steady_note,
        failures=_failures(load),
        abandoned_turns=abandoned_turns,
        retried=sum(r.attempts - 1 for r in load),
        early_stops=sum(r.early_stop for r in load),
        canary=canary,
        verdicts=[judge(gate, full) for gate in parse_gates(scenario.slo)],
        timeline=_timeline(load, end),
        heat=heat,
        by_traffic={
            name: fig.figures([r for r in load if r.traffic == name], 0.0, end, limits)
            for name in names
        }
        if len(names) > 1
        else {},
        itl_batches=batches,
        requests=_columns(load),
        server_metrics=server_metrics or [],
        stopped=stopped,
    )


def write_json(result: msgspec.Struct, path: Path) -> None:
    path.write_bytes(msgspec.json.encode(result))


def read_result(path: Path) -> Result:
    """Reads a run's JSON.

    Raises:
        ValueError: not a result of this schema version.
    """
    try:
        raw = path.read_bytes()
        schema = msgspec.json.decode(raw, type=_SchemaOnly).schema_
        if schema != SCHEMA:
            raise ValueError(f"{path}: schema {schema!r} (this program reads {SCHEMA!r})")
        return msgspec.json.decode(raw, type=Result)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: not a load-test result: {error}") from error


class _SchemaOnly(msgspec.Struct):
    schema_: str = msgspec.field(name="schema", default="none")


def write_jsonl(records: Iterable[RequestRecord], path: Path) -> None:
    """One record a line, with the arrival (s from intended) and token count of each chunk."""
    encode = msgspec.json.Encoder().encode
    with path.open("wb") as file:
        for record in records:
            told = {name: value for name, value in jsonl_row(record).items() if value is not None}
            file.write(encode(told) + b"\n")


def write_csv(result: Result, path: Path) -> None:
    """One figure a line: window, figure, statistic, value, low, high."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("window", "figure", "statistic", "value", "low", "high", "note"))
        for window, found in (("full", result.full), ("steady", result.steady)):
            if found is None:
                continue
            for name, values in found.latency.items():
                mean = values.mean
                out.writerow((window, name, "count", values.count, "", "", ""))
                out.writerow((window, name, "mean", mean.value, mean.low, mean.high, ""))
                for statistic, p in values.percentiles.items():
                    out.writerow((window, name, statistic, p.value, p.low, p.high, p.reason or ""))
            for name, rate in found.rates.items():
                out.writerow((window, name, "rate", rate.value, rate.low, rate.high, ""))
            low, high = found.error_ratio_low, found.error_ratio_high
            out.writerow((window, "error", "ratio", found.error_ratio, low, high, ""))
            share = found.goodput_ratio
            if share is not None:
                out.writerow((window, "goodput", "ratio", share.value, share.low, share.high, ""))
