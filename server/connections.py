"""A connection whose requests' heads are bounded in bytes and time, before anything is answered.

Knows nothing of routes. uvicorn reads a head of any size for as long as the client likes; a client
that sends one byte a minute, or headers without end, would hold a connection and memory for ever.
The app's lifespan state has the `metrics` that count replies which wait for their client.
"""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError
from .settings import MAX_HEADER_BYTES, MAX_URL_BYTES

if TYPE_CHECKING:
    import asyncio

    from .metrics import Metrics

HEAD_SECONDS = 20.0
"""Time for a request line and its headers."""
_MAX_HEAD_BYTES = MAX_HEADER_BYTES + MAX_URL_BYTES


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection, which refuses heads that are long, late or malformed."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = False
        self._head_bytes = 0
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _CountedFlow(transport, self.app_state["metrics"])
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_idle:  # what comes now should be a head, even if the parser skips it
            self._expect_head()
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(ApiError(431, f"the headers have more than {MAX_HEADER_BYTES} bytes"))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._expect_head()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_waiting()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets its error in the shape of all others."""
        self._refuse(ApiError(400, msg.rstrip(".")))

    @property
    def _is_idle(self) -> bool:
        """No request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._is_late)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _is_late(self) -> None:
        if self._in_head:
            self._refuse(ApiError(408, f"the headers took more than {HEAD_SECONDS:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if self._is_idle:  # else the reply to an earlier request is under way, and is cut off
            body = error.body()
            head = (
                f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
                "connection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()


class _CountedFlow(FlowControl):
    """uvicorn's flow control, which counts how often and how long a reply waits to be read."""

    def __init__(self, transport: asyncio.Transport, metrics: Metrics) -> None:
        super().__init__(transport)
        self._metrics = metrics

    async def drain(self) -> None:
        self._metrics.backpressure.inc()
        started = time.monotonic()
        try:
            await super().drain()
        finally:
            self._metrics.backpressure_seconds.inc(time.monotonic() - started)
