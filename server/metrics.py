"""Prometheus figures of what the server sees: requests, streams, the engine's steps.

Knows nothing of routes or of HTTP messages; engine_metrics.py has what the engine counts. Every
family has a name of ours (`convserve_`) with edges fine enough for steps of a millisecond, and,
where vLLM publishes the same fact, an alias under vLLM's name with vLLM's edges, for dashboards and
routers written for it. A new figure is a row in a table.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from typing import TYPE_CHECKING, NamedTuple

import prometheus_client
from prometheus_client import (
    CollectorRegistry,
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from .engine_metrics import EngineFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..engine.client import EngineClient
    from ..engine.messages import EngineStats

FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "draining", "engine_dead")

_FINE = (
    *[round(step * 10.0**exponent, 9) for exponent in range(-5, 2) for step in (1, 2, 5)][2:],
    60.0,
)
"""50 us, 100 us, 200 us, 500 us .. 50 s, 60 s."""
_TOKENS = tuple(float(step * 10**exponent) for exponent in range(6) for step in (1, 2, 5))
# fmt: off
_VLLM_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
_VLLM_ITL = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)
_VLLM_REQUEST = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)
# fmt: on
_ROWS = (1.0, *[float(2**exponent) for exponent in range(3, 15)])
"""1, 8, 16 .. 16384: vLLM's edges for the rows of a step."""
_N = (1.0, 2.0, 5.0, 10.0, 20.0)


class _HistogramRow(NamedTuple):
    name: str
    """Without prefix."""
    help: str
    edges: Sequence[float]
    vllm_edges: Sequence[float] | None
    """None where vLLM has no such figure."""
    vllm_name: str = ""
    """Where it is another."""


_HISTOGRAMS = (
    _HistogramRow("time_to_first_token_seconds", "Request read to first token.", _FINE, _VLLM_TTFT),
    _HistogramRow("inter_token_latency_seconds", "Gap between tokens.", _FINE, _VLLM_ITL),
    _HistogramRow(
        "request_time_per_output_token_seconds", "Mean gap of a request.", _FINE, _VLLM_ITL
    ),
    _HistogramRow("e2e_request_latency_seconds", "Request read to end.", _FINE, _VLLM_REQUEST),
    _HistogramRow("request_queue_time_seconds", "Wait to be scheduled.", _FINE, _VLLM_REQUEST),
    _HistogramRow(
        "request_prefill_time_seconds", "Scheduled to first token.", _FINE, _VLLM_REQUEST
    ),
    _HistogramRow("request_decode_time_seconds", "First token to last.", _FINE, _VLLM_REQUEST),
    _HistogramRow("request_inference_time_seconds", "Scheduled to last.", _FINE, _VLLM_REQUEST),
    _HistogramRow("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS, _TOKENS),
    _HistogramRow(
        "request_prefill_kv_computed_tokens",
        "Prompt tokens that the prefix cache did not have.",
        _TOKENS,
        _TOKENS,
    ),
    _HistogramRow("request_generation_tokens", "Tokens made for a request.", _TOKENS, _TOKENS),
    _HistogramRow("request_params_max_tokens", "max_tokens asked for.", _TOKENS, _TOKENS),
    _HistogramRow("request_params_n", "Choices asked for.", _N, _N),
    _HistogramRow("event_loop_lag_seconds", "Lateness of the server's timer.", _FINE, None),
    _HistogramRow("step_scheduler_seconds", "Planning and committing in a step.", _FINE, None),
    _HistogramRow("step_batch_size", "Sequences of a step.", _ROWS, None),
    _HistogramRow("step_batch_tokens", "Rows of a step.", _ROWS, _ROWS, "iteration_tokens_total"),
)


class _Observed(Collector):
    """One fact as our histogram and, perhaps, as vLLM's.

    The library's own histograms take a lock and walk their buckets for each value, which every
    token would pay for twice.
    """

    def __init__(
        self, text: str, series: Iterable[tuple[str, dict[str, str], Sequence[float]]]
    ) -> None:
        """`series`: name, labels and edges of each histogram."""
        self._text = text
        self._series = [
            (name, labels, (*edges, math.inf), [0] * (len(edges) + 1))
            for name, labels, edges in series
        ]
        self._examples: list[dict[int, Exemplar]] = [{} for _ in self._series]
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._sum += value * times
        for _, _, edges, counts in self._series:
            counts[bisect.bisect_left(edges, value)] += times

    def observe_traced(self, value: float, trace_id: str | None) -> None:
        """Observes; a trace makes the value its bucket's exemplar, which can be looked at."""
        self.observe(value)
        if trace_id is not None:
            example = Exemplar({"trace_id": trace_id}, value, time.time())
            for (_, _, edges, _), examples in zip(self._series, self._examples, strict=True):
                examples[bisect.bisect_left(edges, value)] = example

    def collect(self) -> Iterator[HistogramMetricFamily]:
        for (name, labels, edges, counts), examples in zip(
            self._series, self._examples, strict=True
        ):
            family = HistogramMetricFamily(name, self._text, labels=[*labels])
            totals = zip(map(floatToGoString, edges), itertools.accumulate(counts), strict=True)
            buckets = [
                (edge, total, examples[place]) if place in examples else (edge, total)
                for place, (edge, total) in enumerate(totals)
            ]
            family.add_metric([*labels.values()], buckets, self._sum)
            yield family


class _Counted:
    """One fact in our counter and, perhaps, in vLLM's."""

    def __init__(self, counters: Iterable[Counter]) -> None:
        self._counters = tuple(counters)

    def inc(self, amount: float = 1) -> None:
        for counter in self._counters:
            counter.inc(amount)


class Metrics:
    """All figures of one server, in a registry of its own."""

    def __init__(
        self,
        client: EngineClient,
        model_name: str,
        *,
        vllm: bool,
        routes: Iterable[str] = (),
        live: Callable[[], float] = lambda: 0,
    ) -> None:
        """`routes` get their HTTP counters at once; `live` counts sequences in the server."""
        prometheus_client.disable_created_metrics()
        self.registry = CollectorRegistry()
        self._families: dict[str, Counter] = {}
        self._labels = {"model_name": model_name}
        self._vllm_labels = {"model_name": model_name, "engine": "0"} if vllm else None
        observed = {row.name: self._histogram(row) for row in _HISTOGRAMS}
        self.time_to_first_token = observed["time_to_first_token_seconds"]
        self.inter_token_latency = observed["inter_token_latency_seconds"]
        self.time_per_output_token = observed["request_time_per_output_token_seconds"]
        self.e2e_latency = observed["e2e_request_latency_seconds"]
        self.queue_time = observed["request_queue_time_seconds"]
        self.prefill_time = observed["request_prefill_time_seconds"]
        self.decode_time = observed["request_decode_time_seconds"]
        self.inference_time = observed["request_inference_time_seconds"]
        self.prompt_tokens = observed["request_prompt_tokens"]
        self.computed_tokens = observed["request_prefill_kv_computed_tokens"]
        self.generation_tokens = observed["request_generation_tokens"]
        self.params_max_tokens = observed["request_params_max_tokens"]
        self.params_n = observed["request_params_n"]
        self.event_loop_lag = observed["event_loop_lag_seconds"]
        self.finished = {
            reason: self._counter(
                "requests_finished", "Choices finished.", "request_success", finished_reason=reason
            )
            for reason in FINISH_REASONS
        }
        self.rejected = {
            reason: self._counter(
                "admission_rejections", "Requests turned away.", "admission_rejections",
                reason=reason,
            )
            for reason in REJECTIONS
        }  # fmt: skip
        self.cached_tokens = self._counter(
            "prompt_tokens_cached",
            "Prompt tokens found in the prefix cache.",
            "prompt_tokens_cached",
        )
        self.disconnects = self._counter("client_disconnects", "Clients gone before the end.")
        self.detokenise_seconds = self._counter("detokenise_seconds", "Making text of tokens.")
        self.slow_readers = self._counter("slow_readers", "Streams dropped because nobody read.")
        self.backpressure = self._counter(
            "sse_backpressure", "Times a stream waited for its client to read."
        )
        self.backpressure_seconds = self._counter("sse_backpressure_seconds", "How long they did.")
        self.parity_checks = self._counter(
            "parity_checks", "Greedy outputs that were computed again and compared."
        )
        self.parity_mismatches = self._counter("parity_mismatch", "Those that came out otherwise.")
        self.parity_skipped = self._counter(
            "parity_skipped", "Those that were not, because others waited."
        )
        self._http = Counter(
            "convserve_http_requests",
            "HTTP replies by route and status; 499: the client left first.",
            ("model_name", "route", "status"),
            registry=self.registry,
        )
        self._http_seconds = Histogram(
            "convserve_http_request_duration_seconds",
            "Request read to reply sent, by route.",
            ("model_name", "route"),
            registry=self.registry,
            buckets=_FINE,
        )
        for route in routes:
            self._http_seconds.labels(model_name, route)
            for status in (200, 400, 401, 404, 413, 429, 499, 500, 503):
                self._http.labels(model_name, route, str(status))
        step_seconds = Histogram(
            "convserve_step_duration_seconds",
            "Duration of an engine step; `decode`: every sequence advanced by one token.",
            ("model_name", "kind"),
            registry=self.registry,
            buckets=_FINE,
        )
        self._decode_seconds = step_seconds.labels(model_name, "decode")
        self._mixed_seconds = step_seconds.labels(model_name, "mixed")
        self._step_sequences = observed["step_batch_size"]
        self._step_scheduler = observed["step_scheduler_seconds"]
        self._step_rows = observed["step_batch_tokens"]
        self._steps = client.stats.steps
        client.watch_stats(self._on_stats)
        self.registry.register(EngineFigures(client, self._labels, self._vllm_labels, live))
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)

    def http_reply(self, route: str, status: int, seconds: float) -> None:
        """Counts one reply; `route` is a template, never a raw path."""
        model = self._labels["model_name"]
        self._http.labels(model, route, str(status)).inc()
        self._http_seconds.labels(model, route).observe(seconds)

    def _on_stats(self, stats: EngineStats) -> None:
        """Every report passes here, so no step is missed between two scrapes."""
        if stats.steps == self._steps:
            return
        self._steps = stats.steps
        is_decode = stats.step_tokens == stats.step_sequences
        (self._decode_seconds if is_decode else self._mixed_seconds).observe(stats.step_seconds)
        self._step_sequences.observe(stats.step_sequences)
        self._step_scheduler.observe(stats.scheduler_seconds)
        self._step_rows.observe(stats.step_tokens)

    def render(self) -> bytes:
        """Prometheus' text format."""
        return prometheus_client.generate_latest(self.registry)

    def render_for(self, accept: str) -> tuple[bytes, str]:
        """All figures, and the content type they are written in: OpenMetrics, which has exemplars,
        for who asks for it, else Prometheus' text."""
        # the library would turn the colon of vLLM's names into an underscore
        if openmetrics.CONTENT_TYPE_LATEST.partition(";")[0] in accept:
            return (
                openmetrics.generate_latest(self.registry, escaping=openmetrics.ALLOWUTF8),
                openmetrics.CONTENT_TYPE_LATEST,
            )
        return self.render(), CONTENT_TYPE_PLAIN_0_0_4

    def _named(self, name: str, vllm_name: str | None) -> Iterator[tuple[str, dict[str, str]]]:
        yield f"convserve_{name}", self._labels
        if vllm_name and self._vllm_labels:
            yield f"vllm:{vllm_name}", self._vllm_labels

    def _histogram(self, row: _HistogramRow) -> _Observed:
        vllm_name = None if row.vllm_edges is None else row.vllm_name or row.name
        edges = (row.edges, row.vllm_edges or ())
        named = zip(self._named(row.name, vllm_name), edges, strict=False)
        made = _Observed(row.help, [(name, labels, bounds) for (name, labels), bounds in named])
        self.registry.register(made)
        return made

    def _counter(
        self, name: str, text: str, vllm_name: str | None = None, **extra: str
    ) -> _Counted:
        counters = []
        for full_name, labels in self._named(name, vllm_name):
            family = self._families.get(full_name)
            if family is None:
                family = Counter(full_name, text, (*labels, *extra), registry=self.registry)
                self._families[full_name] = family
            counters.append(family.labels(**labels, **extra))
        return _Counted(counters)
