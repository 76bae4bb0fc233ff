"""What a person sees in the terminal: live figures during a run, tables after it.

Knows results and progress messages; measures nothing.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .histogram import Histogram

if TYPE_CHECKING:
    from types import TracebackType

    from .compare import Comparison
    from .figures import Figures
    from .result import Result
    from .scenario import Scenario
    from .stats import Distribution, Estimate
    from .sweep import Sweep
    from .worker import Progress

_RECENT = 5.0

LABELS = {
    "ttft": "TTFT",
    "ttft_service": "TTFT, service",
    "itl": "ITL (tokens)",
    "tpot": "TPOT",
    "ntpot": "NTPOT",
    "e2e": "E2E",
    "e2e_service": "E2E, service",
    "itl_max": "longest pause",
    "send_gap": "send gap",
    "server_queue": "server: queue",
    "server_ttft": "server: TTFT",
}


def duration(seconds: float | None) -> str:
    """Three significant digits and a unit."""
    if seconds is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.{2 if abs(seconds / scale) < 100 else 1}f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class LiveView:
    """Progress of a run, redrawn four times a second."""

    def __init__(self, scenario: Scenario, console: Console, total: int | None) -> None:
        self._scenario = scenario
        self._console = console
        self._total = total
        self._end = scenario.load.max_duration or sum(s.duration for s in scenario.load.stages)
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._time = 0.0
        self._launched = self._completed = self._tokens = 0
        self._failed: dict[str, int] = {}
        self._in_flight: dict[int, int] = {}
        self._whole = {name: Histogram() for name in ("ttft", "itl", "e2e")}
        self._recent: deque[tuple[float, Progress]] = deque()

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.__exit__(kind, value, trace)

    def update(self, progress: Progress, worker: int) -> None:
        """Takes what one worker did since its last message."""
        self._time = max(self._time, progress.time)
        self._launched += progress.launched
        self._completed += progress.completed
        self._tokens += progress.tokens
        for kind, count in progress.failed.items():
            self._failed[kind] = self._failed.get(kind, 0) + count
        self._in_flight[worker] = progress.in_flight
        for name, whole in self._whole.items():
            whole.merge(Histogram.from_sparse(progress.latency.get(name, [])))
        now = monotonic()
        self._recent.append((now, progress))
        while self._recent and now - self._recent[0][0] > _RECENT:
            self._recent.popleft()
        self._live.update(self._draw())

    def _draw(self) -> Group:
        recent = [progress for _, progress in self._recent]
        span = max(min(_RECENT, self._time), 0.25)
        failed = sum(self._failed.values())
        counts = Table.grid(padding=(0, 3))
        counts.add_row(
            f"[b]{self._time:.0f} s[/b]",
            f"in flight [b]{sum(self._in_flight.values())}[/b]",
            f"done [b]{self._completed}[/b]",
            f"failed [b red]{failed}[/b red]" if failed else "failed 0",
            f"{number(sum(p.completed for p in recent) / span)} req/s",
            f"{number(sum(p.tokens for p in recent) / span)} tok/s",
        )
        table = Table(box=None, padding=(0, 2), header_style="dim")
        for heading in ("", "p50", "p90", "p99", f"last {_RECENT:.0f} s p50", "p99"):
            table.add_column(heading, justify="right")
        for name, whole in self._whole.items():
            last = Histogram()
            for progress in recent:
                last.merge(Histogram.from_sparse(progress.latency.get(name, [])))
            cells = [duration(whole.percentile(q)) for q in (0.5, 0.9, 0.99)]
            cells += [duration(last.percentile(q)) for q in (0.5, 0.99)]
            table.add_row(LABELS[name], *cells)
        parts: list[object] = [counts, table]
        share = self._share()
        if share is not None:
            parts.insert(0, ProgressBar(total=1.0, completed=min(share, 1.0), width=72))
        if self._failed:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self._failed.items())
            parts.append(Text(f"failures: {kinds}", style="red"))
        return Group(Panel(Group(*parts), title=f"{self._scenario.name}", title_align="left"))  # pyright: ignore[reportArgumentType]

    def _share(self) -> float | None:
        if self._total:
            return (self._completed + sum(self._failed.values())) / self._total
        return self._time / self._end if self._end else None


def _ms(seconds: float | None) -> str:
    """Milliseconds; a dot where there are too few samples."""
    if seconds is None:
        return "[dim]·[/dim]"
    return f"{seconds * 1e3:,.{2 if seconds < 0.1 else 1 if seconds < 10 else 0}f}"


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{_ms(low)} .. {_ms(high)}"


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1),
    )
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    return table


def _latency_table(title: str, figures: Figures, wide: bool) -> Table:
    points = ("p50", "p90", "p95", "p99", "p99.9")
    table = _table(title, "ms", "n", "mean", *points, *(["p99, 95 % interval"] if wide else []))
    for name, label in LABELS.items():
        found: Distribution | None = figures.latency.get(name)
        if found is None:
            continue
        tail = found.percentiles["p99"]
        table.add_row(
            label,
            f"{found.count:,}",
            _ms(found.mean.value),
            *(_ms(found.percentiles[p].value) for p in points),
            *([_interval(tail.low, tail.high)] if wide else []),
        )
    return table


def _rate(rate: Estimate | None) -> str:
    if rate is None:
        return "-"
    text = number(rate.value)
    if rate.low is not None and rate.high is not None:
        text += f" [{number(rate.low)} .. {number(rate.high)}]"
    return text


def _rates_table(result: Result) -> Table:
    table = _table("Rates", "per second", "full run", "steady state")
    rows = {
        "requests": "request_rate",
        "output tokens": "output_token_rate",
        "prompt tokens": "prompt_token_rate",
        "goodput, requests": "goodput_rate",
    }
    full, steady = result.full, result.steady
    for label, name in rows.items():
        if name in full.rates:
            table.add_row(
                label, _rate(full.rates[name]), _rate(steady.rates[name]) if steady else "-"
            )
    if full.goodput_ratio is not None:
        table.add_row(
            "goodput, share",
            _rate(full.goodput_ratio),
            _rate(steady.goodput_ratio) if steady else "-",
        )
    table.add_row(
        "in flight", _rate(full.concurrency), _rate(steady.concurrency) if steady else "-"
    )
    if full.prompt_tokens:
        table.add_row("prompt tokens cached", f"{full.cached_tokens / full.prompt_tokens:.1%}", "")
    return table


def print_result(result: Result, console: Console) -> None:
    """The whole report."""
    full = result.full
    console.print(
        f"[b]{result.scenario.name}[/b] on {result.target} (model {result.model}): "
        f"{full.requests} requests in {full.end:.1f} s, {full.completed} complete, "
        f"{full.cancelled} cancelled as planned, {full.failed} failed"
    )
    if result.stopped:
        console.print(f"[yellow]Ended early: {escape(result.stopped)}[/yellow]")
    wide = console.width >= 100
    console.print(_latency_table("Latency, full run (from the intended send)", full, wide))
    if result.steady is not None:
        span = f"{result.steady.start:.1f} to {result.steady.end:.1f} s"
        console.print(_latency_table(f"Latency, steady state ({span})", result.steady, wide))
    if result.steady_note != "found":
        console.print(f"[yellow]Steady state: {result.steady_note}[/yellow]")
    if any(p.value is None for d in full.latency.values() for p in d.percentiles.values()):
        console.print("[dim]·  too few samples for this percentile[/dim]")
    console.print(_rates_table(result))
    for name, reason in full.refused.items():
        console.print(f"[yellow]{LABELS[name]} not given: {reason}[/yellow]")
    if full.itl_exact_ratio is not None and full.itl_exact_ratio < 1:
        console.print(
            f"[yellow]{1 - full.itl_exact_ratio:.1%} of inter-token latencies are a chunk's gap "
            "divided by its tokens, not exact[/yellow]"
        )
    for kind, failure in result.failures.items():
        statuses = ", ".join(f"{count} x {code}" for code, count in failure.statuses.items())
        example = f": {escape(failure.examples[0])}" if failure.examples else ""
        console.print(
            f"[red]{failure.count} {kind}[/red] ({statuses or 'no status'}; "
            f"median after {duration(failure.median_time)}){example}"
        )
    if result.abandoned_turns:
        console.print(
            f"[red]{result.abandoned_turns} later turns of failed sessions not sent[/red]"
        )
    if result.retried:
        console.print(f"[yellow]{result.retried} retries (their time counts)[/yellow]")
    if result.early_stops:
        console.print(
            f"[yellow]{result.early_stops} answers ended early: the server does not honour "
            "ignore_eos, output lengths vary[/yellow]"
        )
    if result.canary is not None:
        canary = result.canary
        style = "red" if canary.mismatched or canary.failed else "green"
        console.print(
            f"[{style}]canary: {canary.matched} of {canary.sent} answers right, "
            f"{canary.mismatched} wrong, {canary.failed} failed[/{style}]"
        )
    for verdict in result.verdicts:
        mark = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[yellow]?[/yellow]"}
        value = "" if verdict.value is None else f"  measured {verdict.value:.6g}"
        note = f"  ({verdict.note})" if verdict.note else ""
        console.print(f"{mark[verdict.passed]}  {verdict.gate}{value}{note}")
    print_audit(result, console)


def print_audit(result: Result, console: Console) -> None:
    """What the client says of itself."""
    audit = result.audit
    console.print(
        f"[dim]client: send lag p99 {duration(audit.send_lag_p99)}, loop lag p99 "
        f"{duration(audit.loop_lag_p99)}, CPU {audit.cpu:.0%} of a core, {audit.workers} "
        f"worker(s)[/dim]"
    )
    for warning in audit.warnings:
        console.print(f"[yellow]client: {warning}[/yellow]")
    if not audit.valid:
        reasons = "\n".join(audit.reasons)
        console.print(
            Panel(
                f"The client, or the machine it ran on, was the bottleneck:\n{reasons}",
                title="INVALID",
                style="bold red",
            )
        )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Verdicts, one figure a line."""
    headings = ("figure", "A", "B", "change", "95 % interval", "noise", "verdict")
    table = _table(f"{comparison.a} -> {comparison.b}", *headings)
    styles = {"better": "green", "worse": "red", "same": "dim", "unclear": "yellow"}
    for row in comparison.rows:
        shown = number if row.figure.endswith("_rate") else duration
        table.add_row(
            row.figure,
            shown(row.a),
            shown(row.b),
            f"{row.change:+.1%}",
            f"{row.low:+.1%} .. {row.high:+.1%}",
            f"{row.noise:.1%}",
            f"[{styles[row.verdict]}]{row.verdict}[/]",
        )
    console.print(table)
    for note in comparison.notes:
        console.print(f"[yellow]{note}[/yellow]")


def print_sweep(sweep: Sweep, console: Console) -> None:
    """The curve as a table, with its knees."""
    times = ("TTFT p50", "TTFT p99", "E2E p50", "E2E p99")
    table = _table("Sweep", "load", "req/s", "tok/s", *times, "goodput", "")
    for point in sweep.points:
        marks = [] if point.valid else ["[red]INVALID[/red]"]
        if point.saturated:
            marks.append("[yellow]beyond capacity[/yellow]")
        table.add_row(
            point.label,
            number(point.request_rate),
            number(point.output_token_rate),
            duration(point.ttft_p50),
            duration(point.ttft_p99),
            duration(point.e2e_p50),
            duration(point.e2e_p99),
            "-" if point.goodput is None else f"{point.goodput:.1%}",
            " ".join(marks),
        )
    console.print(table)
    for line in sweep.conclusions:
        console.print(line)
