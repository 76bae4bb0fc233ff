"""What the engine reports of itself, as Prometheus families that are read when scraped.

Knows nothing of requests. A figure is a row in a table: its name of ours, how to read it, and the
name that vLLM gives to the same fact.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..engine.client import EngineClient
    from ..engine.messages import EngineInfo, EngineStats, Times


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
    _StatRow(
        "padding_tokens", "Rows of replayed graphs that were nobody's.", lambda s: s.padding_tokens
    ),
    _StatRow(
        "gpu_idle_seconds",
        "Time a GPU stood idle while there was work.",
        lambda s: s.gpu_idle_seconds,
    ),
    _StatRow(
        "corrupted_requests",
        "Sequences ended because their logits were not finite.",
        lambda s: s.corrupted_requests,
        "corrupted_requests",
    ),
)


class _TimesRow(NamedTuple):
    name: str
    help: str
    read: Callable[[EngineStats], Times]
    vllm: str


_ENGINE_TIMES = (
    _TimesRow(
        "kv_page_lifetime_seconds",
        "A cached page: full to evicted.",
        lambda s: s.page_lifetimes,
        "kv_block_lifetime_seconds",
    ),
    _TimesRow(
        "kv_page_idle_before_evict_seconds",
        "A cached page: last use to evicted.",
        lambda s: s.page_idle_times,
        "kv_block_idle_before_evict_seconds",
    ),
    _TimesRow(
        "kv_page_reuse_gap_seconds",
        "A cached page: last use to shared again.",
        lambda s: s.page_reuse_gaps,
        "kv_block_reuse_gap_seconds",
    ),
)


class EngineFigures(Collector):
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

    def collect(
        self,
    ) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        stats = self._client.stats
        for row in _ENGINE_GAUGES:
            yield from self._families(GaugeMetricFamily, row, row.read(stats))
        for position, row in enumerate(_ENGINE_COUNTERS):
            # a total that goes back is the engine's mistake; a counter that does kills dashboards
            value = row.read(stats)
            self._totals[position] += max(0.0, value - self._last[position])
            self._last[position] = value
            yield from self._families(CounterMetricFamily, row, self._totals[position])
        edges = self._client.info.page_time_edges
        for times in _ENGINE_TIMES:
            for name, labels in self._named(times.name, times.vllm):
                yield _histogram(name, times.help, labels, edges, times.read(stats))
        replays = CounterMetricFamily(
            "convserve_graph_replay",
            "Steps that replayed a CUDA graph of so many rows.",
            labels=[*self._labels, "padded_size"],
        )
        for rows, count in sorted(stats.graph_replays.items()):
            replays.add_metric([*self._labels.values(), str(rows)], count)
        yield replays
        yield _gauge(
            "convserve_live_sequences", "Sequences in the server.", self._labels, self._live()
        )
        alive = float(self._client.is_alive)
        yield _gauge("convserve_engine_alive", "1 while the engine runs.", self._labels, alive)
        yield _gauge(
            "convserve_engine_heartbeat_age_seconds",
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
        for name, labels in self._named(row.name, row.vllm):
            family = kind(name, row.help, labels=list(labels))
            family.add_metric(list(labels.values()), value)
            yield family

    def _named(self, name: str, vllm: str | None) -> Iterator[tuple[str, dict[str, str]]]:
        yield f"convserve_{name}", self._labels
        if vllm and self._vllm_labels:
            yield f"vllm:{vllm}", self._vllm_labels

    def _facts(self, info: EngineInfo) -> Iterator[GaugeMetricFamily]:
        build = {
            "version": importlib.metadata.version("convserve"),
            "model_type": info.model_type,
            "device": info.device,
            "dtype": info.dtype,
        }
        yield _gauge("convserve_build_info", "What runs.", self._labels | build, 1)
        for name, text, value in (
            ("kv_bytes_per_token", "KV bytes of one token.", info.kv_bytes_per_token),
            (
                "conv_bytes_per_sequence",
                "Conv state of one sequence.",
                info.conv_bytes_per_sequence,
            ),
            (
                "recurrent_bytes_per_sequence",
                "Recurrent state of one sequence.",
                info.recurrent_bytes_per_sequence,
            ),
            ("page_pool_bytes", "Size of the page pool.", info.page_pool_bytes),
            ("weight_bytes", "Size of the weights.", info.weight_bytes),
        ):
            yield _gauge(f"convserve_{name}", text, self._labels, value)
        if self._vllm_labels:
            cache = {"block_size": str(info.page_size), "num_gpu_blocks": str(info.num_pages)}
            yield _gauge("vllm:cache_config_info", "The KV cache.", self._vllm_labels | cache, 1)
            # routers of Kubernetes' inference gateway read it even where there are no adapters
            lora = {"max_lora": "0", "waiting_lora_adapters": "", "running_lora_adapters": ""}
            yield _gauge("vllm:lora_requests_info", "Adapters.", self._vllm_labels | lora, 1)


def _gauge(name: str, text: str, labels: dict[str, str], value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=[*labels])
    family.add_metric([*labels.values()], value)
    return family


def _histogram(
    name: str, text: str, labels: dict[str, str], edges: tuple[float, ...], times: Times
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=[*labels])
    counts = times.counts or (0,) * (len(edges) + 1)  # before the first report
    bounds = map(floatToGoString, (*edges, math.inf))
    buckets = list(zip(bounds, itertools.accumulate(counts), strict=True))
    family.add_metric([*labels.values()], buckets, times.seconds)
    return family
