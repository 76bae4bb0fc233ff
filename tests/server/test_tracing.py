"""OpenTelemetry: one span a request, under its caller's trace, with what it waited for and took.

Breaks for: whoever follows a request through several services. Skipped without the `otel` extra.
"""

from __future__ import annotations

import logging
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from convserve.server.app import create_app
from convserve.server.settings import ServerSettings
from convserve.server.tracing import RequestTraces, open_traces
from fake_engine import FakeEngine
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics

if TYPE_CHECKING:
    from collections.abc import Callable

pytest.importorskip("opentelemetry.sdk", reason="the otel extra is not installed")
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine("hello", cached=1)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def client(exporter: InMemorySpanExporter, engine: FakeEngine) -> httpx.AsyncClient:
    """Of a server that traces."""
    traces = RequestTraces(SimpleSpanProcessor(exporter), "tiny")
    settings = ServerSettings(model_names=("tiny",), max_queue=0)
    app = create_app(engine, FOLDER, settings, traces)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_a_span_with_its_times(
    client: httpx.AsyncClient,
    exporter: InMemorySpanExporter,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    with caplog.at_level(logging.INFO, "convserve.access"):
        ask = {"prompt": "abc", "stream": stream}
        assert (await client.post("/v1/completions", json=ask, headers=headers)).status_code == 200
    [span] = exporter.get_finished_spans()
    assert span.name == "POST /v1/completions"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == PARENT
    found = dict(span.attributes or {})
    assert found["http.response.status_code"] == 200
    assert found["gen_ai.request.model"] == "tiny"
    assert found["gen_ai.usage.input_tokens"] == 3
    assert found["gen_ai.usage.output_tokens"] == 6
    assert found["gen_ai.usage.cached_tokens"] == 1
    assert found["gen_ai.response.finish_reasons"] == ("stop",)
    assert found["gen_ai.latency.time_in_queue"] == 0.001
    assert found["gen_ai.latency.time_in_model_prefill"] == 0.002
    took = (span.end_time - span.start_time) / 1e9
    assert 0 < found["gen_ai.latency.time_in_model_decode"] < took
    assert 0 < found["gen_ai.latency.time_to_first_token"] < took
    [record] = caplog.records
    assert record.facts["trace_id"] == TRACE  # type: ignore[attr-defined]
    assert record.facts["id"] == found["convserve.request_id"]  # type: ignore[attr-defined]


async def test_latencies_point_at_traces_that_are_kept(client: httpx.AsyncClient) -> None:
    other = "1" * 32
    for trace, kept in ((TRACE, "01"), (other, "00")):
        headers = {"traceparent": f"00-{trace}-{PARENT}-{kept}"}
        await client.post("/v1/completions", json={"prompt": "abc"}, headers=headers)
    plain = await client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert TRACE not in plain.text
    accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
    reply = await client.get("/metrics", headers=accept)
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    exemplars = {
        sample.name
        for family in openmetrics(reply.text)
        for sample in family.samples
        if sample.exemplar and sample.exemplar.labels == {"trace_id": TRACE}
    }
    latencies = ("time_to_first_token_seconds_bucket", "e2e_request_latency_seconds_bucket")
    assert exemplars == {
        f"{owner}{name}" for owner in ("convserve_", "vllm:") for name in latencies
    }
    assert other not in reply.text


async def test_what_is_traced(client: httpx.AsyncClient, exporter: InMemorySpanExporter) -> None:
    for path in ("/health", "/metrics", "/stats", "/"):
        await client.get(path)
    assert exporter.get_finished_spans() == ()
    broken = {"traceparent": "00-nonsense", "tracestate": "\x01"}
    await client.post("/v1/completions", json={"prompt": "a", "n": 9}, headers=broken)
    await client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    [refused] = exporter.get_finished_spans()  # the other's caller did not sample its trace
    assert refused.parent is None
    assert (refused.attributes or {})["http.response.status_code"] == 400
    assert refused.status.is_unset


async def test_our_fault_is_an_error(
    client: httpx.AsyncClient, exporter: InMemorySpanExporter, engine: FakeEngine
) -> None:
    engine.fail_with = "broken"
    assert (await client.post("/v1/completions", json={"prompt": "a"})).status_code == 500
    [span] = exporter.get_finished_spans()
    assert not span.status.is_ok
    assert not span.status.is_unset


async def test_nothing_is_traced_unless_asked_for(
    connect: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(FakeEngine()) as client:
        with caplog.at_level(logging.INFO, "convserve.access"):
            await client.get("/v1/models", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert "trace_id" not in caplog.records[0].facts  # type: ignore[attr-defined]


def test_spans_reach_a_collector_before_the_server_ends() -> None:
    received: list[tuple[str, str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, self.headers["Content-Type"], body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.handle_request, daemon=True)
        thread.start()
        traces = open_traces(f"http://127.0.0.1:{collector.server_port}/v1/traces", "tiny")
        traces.begin({"method": "GET", "headers": []}).end()
        traces.close()
        thread.join(10)
    [(path, kind, body)] = received
    assert (path, kind) == ("/v1/traces", "application/x-protobuf")
    assert b"convserve" in body
