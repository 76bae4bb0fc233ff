"""Better, same or worse? Compares runs figure by figure, with intervals and a noise floor.

Reads results only; runs servers in turn (A B A B A) when given two of them. The unit of resampling
is a block of neighbouring requests; rounds of an interleaved comparison are paired besides.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from .histogram import bucket_values
from .run import probe, run
from .stats import block_bootstrap, min_samples, student_t

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .result import Result
    from .run import Settings
    from .scenario import Scenario

SCHEMA = "convserve.loadtest.compare/1"

REPLICATES = 1000

Outcome = Literal["better", "same", "worse", "unclear"]

_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_FIGURES = ("ttft", "tpot", "e2e", "itl")
_RATES = {"request_rate": "completed", "output_token_rate": "output_tokens"}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of A and B; `change` is B / A - 1."""

    figure: str
    a: float
    b: float
    change: float
    low: float
    high: float
    noise: float
    """Largest change between runs (or halves) of A alone."""
    verdict: Outcome


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All figures, and what to be careful about."""

    schema_: str = msgspec.field(name="schema", default=SCHEMA)
    a: str
    b: str
    runs_a: int
    runs_b: int
    valid: bool
    notes: list[str]
    rows: list[Row]

    @property
    def exit_code(self) -> int:
        """1 if anything got worse, 2 if a run was invalid."""
        if not self.valid:
            return 2
        return int(any(row.verdict == "worse" for row in self.rows))


class _Values:
    """One run's figure as one number per request (or per slice of time, for rates)."""

    def __init__(self, values: NDArray[np.float64]) -> None:
        self._values = values
        self.count = values.size

    def original(self) -> NDArray[np.float64]:
        """[1, values]."""
        return self._values[None]

    def draws(self, generator: np.random.Generator) -> NDArray[np.float64]:
        """[replicates, values]."""
        return block_bootstrap(self._values, REPLICATES, generator)

    def halves(self) -> list[_Values]:
        """Alternate tenths of the run: what differs between them is noise."""
        tenths = np.array_split(self._values, min(10, max(self.count, 1)))
        return [_Values(np.concatenate([np.zeros(0), *tenths[k::2]])) for k in (0, 1)]

    @staticmethod
    def statistics(
        pooled: Sequence[NDArray[np.float64]], quantiles: Sequence[float | None]
    ) -> NDArray[np.float64]:
        """Of several runs pooled: [quantile (None: the mean), replicates]."""
        whole = np.concatenate(pooled, axis=1)
        return np.stack(
            [whole.mean(axis=1) if q is None else np.quantile(whole, q, axis=1) for q in quantiles]
        )


class _Batches:
    """One run's pooled inter-token latencies, in batches by time over the buckets in use."""

    def __init__(self, counts: NDArray[np.float64], values: NDArray[np.float64]) -> None:
        self._counts = counts
        self._bucket_values = values
        self.count = int(counts.sum())

    @classmethod
    def of_runs(cls, runs: Sequence[Result]) -> list[_Batches]:
        """All runs over the same buckets."""
        rows = [[dict(batch) for batch in run.itl_batches] for run in runs]
        used = sorted({bucket for run in rows for batch in run for bucket in batch})
        values = bucket_values(np.array(used, dtype=np.int64))
        return [
            cls(
                np.array([[batch.get(k, 0) for k in used] for batch in run], dtype=np.float64)
                if run
                else np.zeros((0, len(used))),
                values,
            )
            for run in rows
        ]

    def original(self) -> NDArray[np.float64]:
        """[1, buckets]."""
        return self._counts.sum(axis=0)[None]

    def draws(self, generator: np.random.Generator) -> NDArray[np.float64]:
        """[replicates, buckets]."""
        n = len(self._counts)
        return generator.multinomial(n, np.full(n, 1 / n), size=REPLICATES) @ self._counts

    def halves(self) -> list[_Batches]:
        return [_Batches(self._counts[k::2], self._bucket_values) for k in (0, 1)]

    def statistics(
        self, pooled: Sequence[NDArray[np.float64]], quantiles: Sequence[float | None]
    ) -> NDArray[np.float64]:
        below = np.cumsum(np.sum(pooled, axis=0), axis=1)
        found = []
        for q in quantiles:
            rank = np.maximum(np.ceil((q or 0.0) * below[:, -1]), 1.0)
            found.append(self._bucket_values[(below < rank[:, None]).sum(axis=1)])
        return np.stack(found)


Samples = list[_Values] | list[_Batches]


def _samples(figure: str, runs: Sequence[Result]) -> Samples:
    if figure == "itl":
        return _Batches.of_runs(runs)
    if figure in _RATES:
        return [_Values(np.array(getattr(run.timeline, _RATES[figure]))) for run in runs]
    made = []
    for one in runs:
        columns = one.requests
        rows = zip(columns[figure], columns["outcome"], columns["slow_reader"], strict=True)
        made.append(
            _Values(
                np.array([v for v, end, slow in rows if v is not None and end == "ok" and not slow])
            )
        )
    return made


def _noise(samples: Samples, quantiles: Sequence[float | None]) -> NDArray[np.float64]:
    """Largest relative change between neighbouring runs, or between the halves of one."""
    parts = samples if len(samples) > 1 else samples[0].halves()
    parts = [part for part in parts if part.count]
    if len(parts) < 2:
        return np.zeros(len(quantiles))
    points = [part.statistics([part.original()], quantiles)[:, 0] for part in parts]
    with np.errstate(divide="ignore", invalid="ignore"):
        changes = [np.abs(after / before - 1) for before, after in pairwise(points)]
    return np.nan_to_num(np.max(changes, axis=0), posinf=1.0)


def _rows(
    names: Sequence[str],
    quantiles: Sequence[float | None],
    a: Samples,
    b: Samples,
    margin: float,
) -> list[Row]:
    generator = np.random.default_rng(0)
    rising_is_good = names[0] in _RATES
    sides = []
    for samples in (a, b):
        statistics = samples[0].statistics
        point = statistics([s.original() for s in samples], quantiles)
        drawn = statistics([s.draws(generator) for s in samples], quantiles)
        sides.append((point[:, 0], drawn))
    (left, left_drawn), (right, right_drawn) = sides
    noises = _noise(a, quantiles)
    rows = []
    for k, name in enumerate(names):
        if not (left[k] > 0 and right[k] > 0):
            continue
        # in a short run a resample may hold nothing at all: as good as a thousandth
        left_drawn[k] = np.maximum(left_drawn[k], left[k] / 1e3)
        right_drawn[k] = np.maximum(right_drawn[k], right[k] / 1e3)
        centre = math.log(right[k] / left[k])
        low, high = np.quantile(np.log(right_drawn[k] / left_drawn[k]), [0.025, 0.975])
        if min(len(a), len(b)) >= 3:
            # differences between rounds show what resampling within a run cannot
            rounds = [
                math.log(_point(y, quantiles[k]) / _point(x, quantiles[k]))
                for x, y in zip(a, b, strict=False)
            ]
            half = student_t(len(rounds) - 1) * float(np.std(rounds, ddof=1) / len(rounds) ** 0.5)
            low, high = min(low, centre - half), max(high, centre + half)
        rows.append(
            _judged(name, left[k], right[k], (centre, low, high), noises[k], margin, rising_is_good)
        )
    return rows


def _point(sample: _Values | _Batches, q: float | None) -> float:
    return float(sample.statistics([sample.original()], [q])[0, 0])


def _judged(
    name: str,
    a: float,
    b: float,
    logs: tuple[float, float, float],
    noise: float,
    margin: float,
    rising_is_good: bool,
) -> Row:
    change, low, high = (math.expm1(float(x)) for x in logs)
    threshold = max(float(noise), margin)
    verdict: Outcome = "unclear"
    if (low > 0 or high < 0) and abs(change) > threshold:
        verdict = "better" if (change > 0) == rising_is_good else "worse"
    elif -threshold <= low and high <= threshold:
        verdict = "same"
    return Row(
        figure=name,
        a=float(a),
        b=float(b),
        change=change,
        low=low,
        high=high,
        noise=float(noise),
        verdict=verdict,
    )


def compare_results(
    a: Sequence[Result],
    b: Sequence[Result],
    margin: float = 0.02,
    labels: tuple[str, str] = ("A", "B"),
) -> Comparison:
    """Compares runs of A with runs of B, in the order they were made.

    Args:
        margin: smallest relative change worth a verdict.
    """
    notes: list[str] = []
    for label, runs in zip(labels, (a, b), strict=True):
        notes += [f"{label} is INVALID: {r}" for run in runs for r in run.audit.reasons]
        failed = sum(run.full.failed for run in runs)
        if failed:
            notes.append(f"{label}: {failed} failed requests are not in its latencies")
    if len({msgspec.json.encode(run.scenario) for run in (*a, *b)}) > 1:
        notes.append("the runs are of different scenarios")
    rows: list[Row] = []
    for figure in (*_FIGURES, *_RATES):
        both = _samples(figure, [*a, *b])
        left, right = both[: len(a)], both[len(a) :]
        have = min(sum(s.count for s in left), sum(s.count for s in right))
        if figure in _RATES:
            wanted: dict[str, float | None] = {figure: None} if have >= 10 else {}
        else:
            wanted = {}
            for name, q in _QUANTILES.items():
                if have >= min_samples(q):
                    wanted[f"{figure}.{name}"] = q
                elif have:
                    notes.append(
                        f"{figure}.{name} not compared: needs {min_samples(q)}, has {have}"
                    )
        if wanted:
            rows += _rows(list(wanted), list(wanted.values()), left, right, margin)
    return Comparison(
        a=labels[0],
        b=labels[1],
        runs_a=len(a),
        runs_b=len(b),
        valid=all(run.audit.valid for run in (*a, *b)),
        notes=notes,
        rows=rows,
    )


async def compare_servers(
    scenario: Scenario,
    a: Settings,
    b: Settings,
    rounds: int,
    margin: float,
    *,
    on_round: Callable[[str, Result], None] | None = None,
    interrupt: asyncio.Event | None = None,
) -> tuple[Comparison, list[Result], list[Result]]:
    """Runs A B A B ... A (`rounds` of B, one more of A) and compares.

    Raises:
        RunError: a server does not answer.
    """
    known = {"A": await probe(a, scenario), "B": await probe(b, scenario)}
    runs: dict[str, list[Result]] = {"A": [], "B": []}
    for name in "AB" * rounds + "A":
        settings = a if name == "A" else b
        result, _ = await run(scenario, settings, known=known[name], interrupt=interrupt)
        runs[name].append(result)
        if on_round is not None:
            on_round(name, result)
        if interrupt is not None and interrupt.is_set():
            break
    labels = (f"A {a.url}", f"B {b.url}")
    return compare_results(runs["A"], runs["B"], margin, labels), runs["A"], runs["B"]
