"""Prometheus figures: what the server sees of requests, and what the engine reports of itself.

Knows nothing of routes or of HTTP messages. Every family has a name of ours (`convserve_`) with
edges fine enough for steps of a millisecond, and, where vLLM publishes the same fact, an alias
under vLLM's name with vLLM's edges, for dashboards and routers written for it. A new figure is a
row in a table.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, NamedTuple

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..engine.client import EngineClient
    from ..engine.messages import EngineInfo, EngineStats

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
_N = (1.0, 2.0, 5.0, 10.0, 20.0)


class _HistogramRow(NamedTuple):
    name: str
    """Without prefix; vLLM's name is the same."""
    help: str
    edges: Sequence[float]
    vllm_edges: Sequence[float] | None
    """None where vLLM has no such figure."""


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
    _HistogramRow("request_generation_tokens", "Tokens made for a request.", _TOKENS, _TOKENS),
    _HistogramRow("request_params_max_tokens", "max_tokens asked for.", _TOKENS, _TOKENS),
    _HistogramRow("request_params_n", "Choices asked for.", _N, _N),
    _HistogramRow("event_loop_lag_seconds", "Lateness of the server's timer.", _FINE, None),
)


class _StatRow(NamedTuple):
    name: str
    help: str
    read: Callable[[EngineStats], float]
    vllm: str | None = None


_ENGINE_GAUGES = (
    _StatRow(
        "requests_running", "Sequences that run.", lambda s: s.running, "num_requests_running"
    ),
    _StatRow(
        "requests_waiting", "Sequences that wait.", lambda s: s.waiting, "num_requests_waiting"
    ),
    _StatRow(
        "kv_cache_usage_ratio",
        "Share of KV pages in use, 0..1.",
        lambda s: s.pages_used / max(s.pages_total, 1),
        "kv_cache_usage_perc",
    ),
    _StatRow("kv_pages_used", "KV pages in use.", lambda s: s.pages_used),
    _StatRow("kv_pages_kept", "Idle KV pages kept for sharing.", lambda s: s.pages_kept),
    _StatRow(
        "kv_pages_free",
        "KV pages that hold nothing.",
        lambda s: max(s.pages_total - s.pages_used - s.pages_kept, 0),
    ),
    _StatRow("kv_pages_total", "KV pages.", lambda s: s.pages_total),
    _StatRow("conv_slots_used", "Conv-state slots in use.", lambda s: s.slots_used),
    _StatRow("conv_slots_total", "Conv-state slots.", lambda s: s.slots_total),
    _StatRow("conv_tails_stored", "Conv windows stored for sharing.", lambda s: s.tails_stored),
    _StatRow("conv_tails_total", "Places for them.", lambda s: s.tails_total),
    _StatRow("step_batch_tokens", "Token rows of the last step.", lambda s: s.step_tokens),
    _StatRow("step_duration_seconds", "Duration of the last step.", lambda s: s.step_seconds),
    _StatRow(
        "step_scheduler_seconds",
        "Planning and committing in the last step.",
        lambda s: s.scheduler_seconds,
    ),
)
_ENGINE_COUNTERS = (
    _StatRow(
        "prompt_tokens", "Prompt tokens processed.", lambda s: s.prompt_tokens, "prompt_tokens"
    ),
    _StatRow(
        "generation_tokens", "Tokens generated.", lambda s: s.generation_tokens, "generation_tokens"
    ),
    _StatRow(
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda s: s.prefix_queries,
        "prefix_cache_queries",
    ),
    _StatRow(
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda s: s.prefix_hits,
        "prefix_cache_hits",
    ),
    _StatRow(
        "replayed_tokens", "Tokens run again to rebuild conv windows.", lambda s: s.replayed_tokens
    ),
    _StatRow("conv_tails_evicted", "Stored conv windows given up.", lambda s: s.tails_evicted),
    _StatRow("preemptions", "Sequences preempted.", lambda s: s.preemptions, "num_preemptions"),
    _StatRow("steps", "Engine steps.", lambda s: s.steps),
    _StatRow("step_seconds", "Time spent in steps.", lambda s: s.step_seconds_total),
)


class _Observed:
    """One fact in our histogram and, perhaps, in vLLM's."""

    def __init__(self, histograms: Iterable[Histogram]) -> None:
        self._histograms = tuple(histograms)

    def observe(self, value: float, times: int = 1) -> None:
        for histogram in self._histograms:
            for _ in range(times):
                histogram.observe(value)


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
        self.slow_readers = self._counter("slow_readers", "Streams dropped because nobody read.")
        self._http = Counter(
            "convserve_http_requests",
            "HTTP replies by route and status; 499: the client left first.",
            ("model_name", "route", "status"),
            registry=self.registry,
        )
        for route in routes:
            for status in (200, 400, 401, 404, 413, 429, 499, 500, 503):
                self._http.labels(model_name, route, str(status))
        self.registry.register(_EngineFigures(client, self._labels, self._vllm_labels, live))

    def http_reply(self, route: str, status: int) -> None:
        """Counts one reply; `route` is a template, never a raw path."""
        self._http.labels(self._labels["model_name"], route, str(status)).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return prometheus_client.generate_latest(self.registry)

    def _named(self, name: str, vllm_name: str | None) -> Iterator[tuple[str, dict[str, str]]]:
        yield f"convserve_{name}", self._labels
        if vllm_name and self._vllm_labels:
            yield f"vllm:{vllm_name}", self._vllm_labels

    def _histogram(self, row: _HistogramRow) -> _Observed:
        vllm_name = None if row.vllm_edges is None else row.name
        return _Observed(
            Histogram(
                name,
                row.help,
                labels,
                registry=self.registry,
                buckets=row.edges if name.startswith("convserve_") else row.vllm_edges or (),
            ).labels(**labels)
            for name, labels in self._named(row.name, vllm_name)
        )

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


class _EngineFigures(Collector):
    """The engine's latest report, read when scraped."""

    def __init__(
        self,
        client: EngineClient,
        labels: dict[str, str],
        vllm_labels: dict[str, str] | None,
        live: Callable[[], float],
    ) -> None:
        self._client = client
        self._labels = labels
        self._vllm_labels = vllm_labels
        self._live = live
        self._totals = [0.0] * len(_ENGINE_COUNTERS)
        self._last = [0.0] * len(_ENGINE_COUNTERS)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._client.stats
        for row in _ENGINE_GAUGES:
            yield from self._families(GaugeMetricFamily, row, row.read(stats))
        for position, row in enumerate(_ENGINE_COUNTERS):
            # a total that goes back is the engine's mistake; a counter that does kills dashboards
            value = row.read(stats)
            self._totals[position] += max(0.0, value - self._last[position])
            self._last[position] = value
            yield from self._families(CounterMetricFamily, row, self._totals[position])
        yield _gauge("live_sequences", "Sequences in the server.", self._labels, self._live())
        yield _gauge(
            "engine_alive", "1 while the engine runs.", self._labels, float(self._client.is_alive)
        )
        yield _gauge(
            "engine_heartbeat_age_seconds",
            "Since the engine last said anything.",
            self._labels,
            self._client.heartbeat_age,
        )
        yield from self._facts(self._client.info)

    def _families(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        row: _StatRow,
        value: float,
    ) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        names = [(f"convserve_{row.name}", self._labels)]
        if row.vllm and self._vllm_labels:
            names.append((f"vllm:{row.vllm}", self._vllm_labels))
        for name, labels in names:
            family = kind(name, row.help, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family

    def _facts(self, info: EngineInfo) -> Iterator[GaugeMetricFamily]:
        build = {
            "version": importlib.metadata.version("convserve"),
            "model_type": info.model_type,
            "device": info.device,
            "dtype": info.dtype,
        }
        yield _gauge("build_info", "What runs.", self._labels | build, 1)
        for name, text, value in (
            ("kv_bytes_per_token", "KV bytes of one token.", info.kv_bytes_per_token),
            (
                "conv_bytes_per_sequence",
                "Conv state of one sequence.",
                info.conv_bytes_per_sequence,
            ),
            ("page_pool_bytes", "Size of the page pool.", info.page_pool_bytes),
            ("weight_bytes", "Size of the weights.", info.weight_bytes),
        ):
            yield _gauge(name, text, self._labels, value)
        if self._vllm_labels:
            labels = self._vllm_labels | {
                "block_size": str(info.page_size),
                "num_gpu_blocks": str(info.num_pages),
            }
            family = GaugeMetricFamily("vllm:cache_config_info", "The KV cache.", labels=[*labels])
            family.add_metric([*labels.values()], 1)
            yield family


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"convserve_{name}", text, labels=[*labels])
    family.add_metric([*labels.values()], value)
    return family
