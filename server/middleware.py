"""What surrounds every request: an id, a log line, a count, a key check, a bound on headers.

Knows nothing of routes' meaning. Plain ASGI, so that streams and disconnects pass untouched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from .errors import ApiError, internal
from .settings import MAX_HEADER_BYTES, MAX_URL_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from opentelemetry.trace import Span
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .generation import Generation
    from .metrics import Metrics
    from .tracing import RequestTraces

_log = logging.getLogger("convserve.server")
_access = logging.getLogger("convserve.access")
_LABEL = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_ROUTINE = frozenset(
    ("/health", "/ready", "/ping", "/metrics", "/load", "/stats", "/server_info", "/")
)
"""Routes that machines ask over and over; they are neither traced nor, unless they fail, logged."""
_CLIENT_GONE = 499
"""nginx's status of a request that the client left."""


def clean_label(label: str | None) -> str | None:
    """A client's name for something, if it is fit for headers and logs; else None."""
    return label if label is not None and _LABEL.fullmatch(label) else None


@dataclasses.dataclass(slots=True)
class RequestRecord:
    """What is known of one request, for its log line."""

    request_id: str
    """Ours, unique; a client's is only ever a label."""
    label: str | None
    started: float
    """On `time.perf_counter`."""
    send: Send
    """The HTTP server's own. Nothing in between minds parts of a body after the reply's start, so
    a stream hands each of its thousands to it directly."""
    tenant: bytes = b""
    """Digest of the API key that let the request in; empty where no key is asked for."""
    trace_id: str | None = None
    """Of the trace that the request is part of, if it is kept."""
    user: str | None = None
    session: str | None = None
    status: int = 0
    client_gone: bool = False
    generation: Generation | None = None


def record_of(scope: Scope) -> RequestRecord:
    """The record that `RequestRecords` made for this request."""
    return scope["state"]["record"]


class RequestRecords:
    """Outermost: makes the record, answers what nobody caught, logs and counts."""

    def __init__(self, app: ASGIApp, metrics: Metrics, traces: RequestTraces | None) -> None:
        self._app = app
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        label = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        record = RequestRecord(
            request_id=secrets.token_hex(12),
            label=None if label is None else clean_label(label.decode("latin-1")),
            started=time.perf_counter(),
            send=send,
        )
        scope.setdefault("state", {})["record"] = record
        span = None
        if self._traces is not None and scope["path"] not in _ROUTINE:
            span = self._traces.begin(scope)
            record.trace_id = self._traces.kept_trace_id(span)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                name = (record.label or record.request_id).encode()
                message = {**message, "headers": [*message["headers"], (b"x-request-id", name)]}
            await send(message)

        try:
            await self._answer(record, scope, receive, sending)
        finally:
            self._tell(record, scope, span)

    async def _answer(
        self, record: RequestRecord, scope: Scope, receive: Receive, send: Send
    ) -> None:
        try:
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
                raise ApiError(431, f"the headers have more than {MAX_HEADER_BYTES} bytes")
            if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_URL_BYTES:
                raise ApiError(414, f"the URL has more than {MAX_URL_BYTES} bytes")
            await self._app(scope, receive, send)
        except ClientDisconnect:
            record.client_gone = True
            self._metrics.disconnects.inc()
        except Exception as error:  # the last stop before the HTTP server
            if not isinstance(error, ApiError):
                _log.exception("%s: unexpected error", record.request_id)
                error = internal(record.request_id)
            if record.status:
                raise
            await error.response()(scope, receive, send)

    def _tell(self, record: RequestRecord, scope: Scope, span: Span | None) -> None:
        route = getattr(scope.get("route"), "path", "other")
        status = _CLIENT_GONE if record.client_gone else record.status
        seconds = time.perf_counter() - record.started
        self._metrics.http_reply(route, status, seconds)
        facts: dict[str, object] = {
            "id": record.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
        }
        if record.label is not None:
            facts["label"] = record.label
        if record.user is not None:
            facts["user"] = record.user
        if record.session is not None:
            facts["session"] = record.session
        generation = record.generation
        if generation is not None:
            facts["prompt_tokens"] = generation.prompt_tokens
            facts["completion_tokens"] = generation.completion_tokens
            facts["finish"] = generation.outcome
            if generation.first_token_seconds is not None:
                facts["ttft"] = round(generation.first_token_seconds, 6)
        if record.trace_id is not None:
            facts["trace_id"] = record.trace_id
        if span is not None and self._traces is not None:
            self._traces.end(
                span,
                request_id=record.request_id,
                method=scope["method"],
                route=route,
                status=status,
                generation=generation,
            )
        is_routine = route in _ROUTINE and status < 400
        level = logging.DEBUG if is_routine else logging.INFO
        _access.log(level, "request", extra={"facts": facts})


class KeyCheck:
    """Lets a request through that bears one of the keys; every path wants one but the open ones."""

    def __init__(self, app: ASGIApp, keys: Iterable[str], open_paths: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is not None:
            record_of(scope).tenant = tenant
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "a valid API key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error.response()(scope, receive, send)

    def _tenant(self, scope: Scope) -> bytes | None:
        """Digest of the key that a request bears, if it is one of ours."""
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = _digest(key.strip())
        # every key is compared, whichever fits, so time tells nothing
        fits = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest if any(fits) and scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
