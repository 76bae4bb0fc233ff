"""Replies whose work can outlive its reader: server-sent events, and replies made in one piece.

Knows nothing of what is generated. Both kinds watch the connection while they work and stop the
work when the client is gone. A stream's headers wait for its first frame (or, if that takes long,
for the first keep-alive comment), so an early failure still has its own status; after them, the
stream ends once: in what says that all was told, or that the work failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from starlette.responses import Response

from .errors import ApiError, internal
from .middleware import record_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
    from contextlib import AbstractContextManager

    from starlette.types import Receive, Scope, Send

    from .metrics import Metrics
    from .settings import ServerSettings

_log = logging.getLogger("convserve.server")
_COMMENT = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Ending(NamedTuple):
    """The last bytes of a stream."""

    done: bytes
    """After all that was to be told."""
    failed: Callable[[ApiError], bytes]
    """After a failure."""


class ClientGone(Exception):  # noqa: N818 - an event, not an error
    """The client left, or does not read; there is nobody to answer."""


def frame(data: bytes) -> bytes:
    """One event; `data` is JSON on one line."""
    return b"data: " + data + b"\n\n"


_DONE = frame(b"[DONE]")
CHUNKS_END = Ending(_DONE, lambda error: frame(error.body()) + _DONE)
"""The end of a stream of completion chunks."""


class _WatchedReply(Response):
    """A reply that is made while its connection is watched."""

    background = None
    """FastAPI asks for it."""

    def __init__(
        self,
        settings: ServerSettings,
        metrics: Metrics,
        request_id: str,
        admitted: AbstractContextManager[None],
    ) -> None:
        """`admitted` holds the request's place while it is worked on, or raises ApiError."""
        self._settings = settings
        self._metrics = metrics
        self._request_id = request_id
        self._admitted = admitted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _while_connected(receive, self._answer(scope, receive, send))
        except ClientGone:
            self._metrics.disconnects.inc()
            record_of(scope).client_gone = True

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    def _as_api_error(self, error: Exception) -> ApiError:
        """What to tell the client of a failure."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, TimeoutError):
            return ApiError(
                408, f"not done within {self._settings.deadline_seconds:g} s, this server's limit"
            )
        _log.exception("%s: unexpected error", self._request_id, exc_info=error)
        return internal(self._request_id)

    def _deadline(self) -> asyncio.Timeout:
        return asyncio.timeout(self._settings.deadline_seconds or None)


class WholeReply(_WatchedReply):
    """A JSON reply that takes time to make."""

    def __init__(
        self,
        make: Callable[[], Awaitable[bytes]],
        settings: ServerSettings,
        metrics: Metrics,
        request_id: str,
        admitted: AbstractContextManager[None],
    ) -> None:
        """`make` returns the body, or raises ApiError."""
        super().__init__(settings, metrics, request_id, admitted)
        self._make = make

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._admitted:
                async with self._deadline():
                    body = await self._make()
            response = Response(body, media_type="application/json")
        except Exception as error:  # every failure becomes a reply
            response = self._as_api_error(error).response()
        await response(scope, receive, send)


class EventStream(_WatchedReply):
    """A stream of server-sent events."""

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        settings: ServerSettings,
        metrics: Metrics,
        request_id: str,
        admitted: AbstractContextManager[None],
        ending: Ending = CHUNKS_END,
    ) -> None:
        """`frames` yields whole frames, or raises ApiError; it is closed in any case."""
        super().__init__(settings, metrics, request_id, admitted)
        self._frames = frames
        self._ending = ending

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        direct = record_of(scope).send
        writer = _Writer(send, direct, self._settings.send_seconds, self._ending)
        comments = asyncio.create_task(writer.keep_alive(self._settings.keep_alive_seconds))
        try:
            with writer.watched():
                with self._admitted:
                    async with contextlib.aclosing(self._frames), self._deadline():
                        async for data in self._frames:
                            await writer.write(data)
                await writer.end(self._ending.done)
        except ClientGone:
            if writer.is_stuck:
                self._metrics.slow_readers.inc()
            raise
        except Exception as error:  # every failure becomes an end of the stream
            with writer.watched():
                await writer.fail(self._as_api_error(error), scope, receive)
        finally:
            comments.cancel()


class _Writer:
    """Sends one stream's bytes: headers before the first, nothing after the last."""

    def __init__(self, send: Send, direct: Send, send_seconds: float, ending: Ending) -> None:
        """`send` takes the reply's start, `direct` everything after it."""
        self._send = send
        self._direct = direct
        self._ending = ending
        self._send_seconds = send_seconds
        self._lock = asyncio.Lock()
        self._last_sent = time.monotonic()
        self._sending_since: float | None = None
        self._has_started = False
        self._has_ended = False
        self.is_stuck = False
        """The client stopped reading."""

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Stops the task inside, as ClientGone, once the client has not read for too long.

        One timer a stream: a time limit around each chunk costs a tenth of sending it.
        """
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        timer: asyncio.TimerHandle | None = None

        def look() -> None:
            nonlocal timer
            since = self._sending_since
            waited = 0.0 if since is None else time.monotonic() - since
            if waited < self._send_seconds:
                timer = loop.call_later(self._send_seconds - waited, look)
                return
            self.is_stuck = True
            task.cancel()

        if self._send_seconds:
            timer = loop.call_later(self._send_seconds, look)
        try:
            yield
        except asyncio.CancelledError:
            if not self.is_stuck:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            if timer is not None:
                timer.cancel()

    async def write(self, data: bytes) -> None:
        """Sends `data`; raises ClientGone if the client is not there to take it."""
        async with self._lock:
            await self._deliver(data, more=True)

    async def end(self, data: bytes) -> None:
        """Sends the last bytes."""
        async with self._lock:
            self._has_ended = True
            await self._deliver(data, more=False)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Ends with `error`: as the reply if nothing was sent, else as the last event."""
        async with self._lock:
            self._has_ended = True
            if self._has_started:
                await self._deliver(self._ending.failed(error), more=False)
            else:
                await error.response()(scope, receive, self._send)

    async def keep_alive(self, seconds: float) -> None:
        """Sends a comment after each `seconds` of silence; for ever, 0 for never."""
        if seconds <= 0:
            return
        with contextlib.suppress(ClientGone):  # `write` meets it as well
            while True:
                silence = time.monotonic() - self._last_sent
                if silence < seconds or self._lock.locked():
                    await asyncio.sleep(max(seconds - silence, 0.01))
                    continue
                async with self._lock:
                    if self._has_ended:
                        return
                    await self._deliver(_COMMENT, more=True)

    async def _deliver(self, data: bytes, *, more: bool) -> None:
        self._sending_since = time.monotonic()
        try:
            if not self._has_started:
                self._has_started = True
                await self._send(
                    {"type": "http.response.start", "status": 200, "headers": _HEADERS}
                )
            await self._direct({"type": "http.response.body", "body": data, "more_body": more})
        except OSError:
            raise ClientGone from None
        self._last_sent, self._sending_since = time.monotonic(), None


async def _while_connected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Runs `work`; cancels it and raises ClientGone when the connection closes first."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
