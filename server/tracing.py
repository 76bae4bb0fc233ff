"""OpenTelemetry spans, one a request, for servers that are told where to send them.

Knows nothing of routes. A span begins under the caller's trace context (`traceparent`) and ends
with the reply; what the request waited for and took is on it under the names that vLLM gives them.
OpenTelemetry's SDK is an extra (`pip install convserve[otel]`) and is imported only when asked for.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span
    from starlette.types import Scope

    from .generation import Generation

_log = logging.getLogger("convserve.server")


class TracingError(Exception):
    """Traces cannot be sent; one line fit for a person."""


class RequestTraces:
    """Makes the spans of one server."""

    def __init__(self, processor: SpanProcessor, model: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        version = importlib.metadata.version("convserve")
        resource = Resource.create({"service.name": "convserve", "service.version": version})
        self._provider = TracerProvider(resource=resource)  # samples as its caller did, else all
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("convserve.server", version)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def begin(self, scope: Scope) -> Span:
        """A span under the trace context that the request came with, if it came with one."""
        from opentelemetry.trace import SpanKind

        carrier = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        return self._tracer.start_span(
            scope["method"], context=self._propagator.extract(carrier), kind=SpanKind.SERVER
        )

    def kept_trace_id(self, span: Span) -> str | None:
        """The id of a span's trace, as logs write it; None if the trace is not sampled."""
        context = span.get_span_context()
        return f"{context.trace_id:032x}" if context.trace_flags.sampled else None

    def end(
        self,
        span: Span,
        *,
        request_id: str,
        method: str,
        route: str,
        status: int,
        generation: Generation | None,
    ) -> None:
        """Ends the span of a request, which may have generated something."""
        from opentelemetry.trace import StatusCode

        span.update_name(f"{method} {route}")
        span.set_attribute("http.request.method", method)
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("convserve.request_id", request_id)
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        if generation is not None:
            facts = {
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": generation.prompt_tokens,
                "gen_ai.usage.output_tokens": generation.completion_tokens,
                "gen_ai.usage.cached_tokens": generation.cached_tokens,
                "gen_ai.response.finish_reasons": [generation.outcome],
                "gen_ai.latency.time_in_queue": generation.queue_seconds,
                "gen_ai.latency.time_in_model_prefill": generation.prefill_seconds,
                "gen_ai.latency.time_in_model_decode": generation.decode_seconds,
                "gen_ai.latency.time_to_first_token": generation.first_token_seconds,
            }
            span.set_attributes({name: fact for name, fact in facts.items() if fact is not None})
        span.end()

    def close(self) -> None:
        """Sends what was not sent yet; blocks for as long as that takes, or a few seconds."""
        self._provider.shutdown()


def open_traces(endpoint: str, model: str) -> RequestTraces:
    """Spans that go to an OTLP/HTTP collector, in the background and in batches.

    Raises:
        TracingError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(
            f"--otlp-traces-endpoint needs OpenTelemetry: pip install convserve[otel] ({error})"
        ) from None
    _log.info("sending traces to %s", endpoint)
    return RequestTraces(BatchSpanProcessor(OTLPSpanExporter(endpoint, timeout=5)), model)
