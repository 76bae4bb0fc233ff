"""A small HTTP/1.1 client that stamps bytes when they are read from the socket.

General clients stamp when the awaiting task wakes up, after every other ready stream was decoded;
with hundreds of streams ticking together that adds milliseconds. Here `data_received` only notes
the time and keeps the bytes; decoding follows once all ready sockets have been read. Parsing is
httptools'. Knows nothing of JSON, events or load.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast
from urllib.parse import urlsplit

import httptools

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_IDLE = 3.0
"""Seconds an idle connection is trusted: common servers close after 5, and a request written into
a closing connection would look like a failure of the server."""


class ConnectError(Exception):
    """No connection came about; `refused` tells an answer of "nobody listens" from the rest."""

    def __init__(self, message: str, *, refused: bool) -> None:
        super().__init__(message)
        self.refused = refused


class ConnectionLostError(Exception):
    """The connection ended before the answer did."""


class ProtocolError(Exception):
    """The peer does not speak HTTP/1.1."""


class Sink(Protocol):
    """Receives one answer; stamps are `perf_counter` seconds of the read that brought the bytes."""

    def on_headers(self, stamp: float, status: int, headers: dict[str, str]) -> None: ...

    def on_body(self, stamp: float, data: bytes) -> None: ...


class Exchange(NamedTuple):
    """A request whose bytes were handed to the socket at `sent`, and the answer to come."""

    sent: float
    ended: asyncio.Future[float]
    """The stamp of the answer's last byte, or why there is none."""


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, clock: ParseClock) -> None:
        self._loop = loop
        self._clock = clock
        self._transport: asyncio.Transport | None = None
        self._inbox: list[tuple[float, bytes]] = []
        self._draining = False
        self._delayed = 0
        self._lost: Exception | None = None
        self._eof = False
        self._sink: Sink | None = None
        self._ended: asyncio.Future[float] | None = None
        self._on_end: Callable[[float], None] | None = None
        self._complete = False
        self._stamp = 0.0
        self._headers: dict[str, str] = {}
        self._keep_alive = False
        self._read_rate: float | None = None
        self._until_close = False

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._read_rate is not None:
            self._read_slowly(data, self._read_rate)
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        self._inbox.append((perf_counter(), data))
        if not self._draining:
            self._draining = True
            self._loop.call_soon(self._drain)

    def eof_received(self) -> bool:
        self._eof = True
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._eof = True
        self._lost = exc
        if not self._draining and not self._delayed:
            self._settle()

    def _drain(self) -> None:
        started = perf_counter()
        self._draining = False
        inbox, self._inbox = self._inbox, []
        try:
            for stamp, data in inbox:
                if self._sink is not None:
                    self._stamp = stamp
                    self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ if isinstance(error.__context__, Exception) else error)
        except httptools.HttpParserError as error:
            self._fail(ProtocolError(str(error)))
        self._clock.seconds += perf_counter() - started
        if self._complete:
            self._end()
        elif self._eof and not self._inbox and not self._delayed:
            self._settle()

    def _read_slowly(self, data: bytes, rate: float) -> None:
        """Takes the bytes as late as reading them one by one would, and reads nothing meanwhile."""
        assert self._transport is not None
        self._transport.pause_reading()
        self._delayed += 1
        self._loop.call_later(len(data) / rate, self._take_delayed, data)

    def _take_delayed(self, data: bytes) -> None:
        self._delayed -= 1
        self._take(data)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _settle(self) -> None:
        """The peer closed: ends the exchange, as success if its length was "until close"."""
        if self._until_close and self._lost is None:
            self._end()
        else:
            self._fail(ConnectionLostError(str(self._lost or "closed by the server")))

    def _fail(self, error: Exception) -> None:
        self.abort()
        self._end(error)

    def _end(self, error: Exception | None = None) -> None:
        """The exchange is over; another may begin."""
        ended, on_end = self._ended, self._on_end
        self._ended = self._on_end = self._sink = None
        self._complete = False
        if ended is None or ended.done():
            return
        if error is not None:
            ended.set_exception(error)
        else:
            ended.set_result(self._stamp)
            if on_end is not None:
                on_end(self._stamp)

    # httptools callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        headers, status = self._headers, self._parser.get_status_code()
        framed = "content-length" in headers or "transfer-encoding" in headers
        self._until_close = not framed and status not in (204, 304)
        if self._sink is not None:
            self._sink.on_headers(self._stamp, status, headers)

    def on_body(self, body: bytes) -> None:
        if self._sink is not None:
            self._sink.on_body(self._stamp, body)

    def on_message_complete(self) -> None:
        if self._until_close and not self._eof:
            return
        self._keep_alive = self._parser.should_keep_alive()
        self._complete = True

    # use

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and not self._eof

    @property
    def reusable(self) -> bool:
        return self.is_open and self._keep_alive and self._read_rate is None

    def abort(self) -> None:
        """Drops the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def begin(
        self,
        request: bytes,
        sink: Sink,
        read_rate: float | None = None,
        on_end: Callable[[float], None] | None = None,
    ) -> Exchange:
        """Sends a request, whose answer goes to the sink; await it with `finish`.

        Args:
            read_rate: bytes per second to read at most, for a deliberately slow reader.
            on_end: called with the last byte's stamp in the moment that the answer is complete,
                before whoever awaits it: it may begin the next exchange.

        Raises:
            ConnectionLostError
        """
        if self._transport is None or not self.is_open:
            raise ConnectionLostError("closed by the server")
        self._sink = sink
        self._on_end = on_end
        self._headers = {}
        self._keep_alive = self._complete = False
        self._read_rate = read_rate
        self._parser = httptools.HttpResponseParser(self)
        self._ended = self._loop.create_future()
        if read_rate is not None:
            raw = self._transport.get_extra_info("socket")
            if raw is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sent = perf_counter()
        self._transport.write(request)
        return Exchange(sent, self._ended)

    async def finish(self, exchange: Exchange) -> float:
        """Awaits an answer's last byte and returns its stamp; drops the connection if cancelled.

        Raises:
            ConnectionLostError, ProtocolError, or whatever the sink raised.
        """
        try:
            return await exchange.ended
        except asyncio.CancelledError:
            if self._ended is exchange.ended:
                self.abort()
            raise

    async def exchange(self, request: bytes, sink: Sink) -> None:
        """Sends a request and feeds its answer to the sink until complete. Raises as `finish`."""
        await self.finish(self.begin(request, sink))


class ParseClock:
    """Seconds spent on decoding answers, over all connections of a pool."""

    def __init__(self) -> None:
        self.seconds = 0.0


class Target:
    """A base URL taken apart.

    Raises:
        ValueError: not an http(s) URL with a host.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url: {url!r} is not http://host[:port][/path]")
        self.host = parts.hostname
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        path = parts.path.rstrip("/")
        self.root = path.removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self.root}"
        self.host_header = parts.netloc.rpartition("@")[2]


class Pool:
    """Keep-alive connections to one target, most recently used first."""

    def __init__(
        self,
        target: Target,
        headers: dict[str, str] | None = None,
        connect_timeout: float = 10.0,
        keep_alive: bool = True,
    ) -> None:
        self.target = target
        self.clock = ParseClock()
        self._headers = "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        self._connect_timeout = connect_timeout
        self._keep_alive = keep_alive
        self._idle: list[tuple[float, Connection]] = []
        self._tls = ssl.create_default_context() if target.tls else None
        self._address: str | None = None

    def encode(self, method: str, path: str, body: bytes = b"", headers: str = "") -> bytes:
        """The bytes of a request; paths are relative to the target's root."""
        connection = "keep-alive" if self._keep_alive else "close"
        head = (
            f"{method} {self.target.root}{path} HTTP/1.1\r\nHost: {self.target.host_header}\r\n"
            f"Connection: {connection}\r\nAccept: */*\r\n{self._headers}{headers}"
        )
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return f"{head}\r\n".encode() + body

    def take(self) -> Connection | None:
        """An open connection that nobody uses, if there is one."""
        while self._idle:
            since, connection = self._idle.pop()
            if connection.is_open and perf_counter() - since < _MAX_IDLE:
                return connection
            connection.abort()
        return None

    async def acquire(self, fresh: bool = False) -> tuple[Connection, bool]:
        """A connection, and whether it was already open.

        Raises:
            ConnectError
        """
        if not fresh and (connection := self.take()) is not None:
            return connection, True
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout):
                # a pinned address keeps name resolution out of later figures
                _, protocol = await loop.create_connection(
                    lambda: Connection(loop, self.clock),
                    self._address or self.target.host,
                    self.target.port,
                    ssl=self._tls,
                    server_hostname=self.target.host if self._tls else None,
                )
        except TimeoutError as error:
            raise ConnectError(
                f"no connection within {self._connect_timeout:g} s", refused=False
            ) from error
        except ConnectionRefusedError as error:
            raise ConnectError(str(error), refused=True) from error
        except OSError as error:
            refused = "refused" in str(error).lower() or "[Errno 111]" in str(error)
            raise ConnectError(str(error), refused=refused) from error
        if self._address is None:
            self._address = protocol._transport.get_extra_info("peername")[0]  # pyright: ignore
        return protocol, False

    async def open(self, count: int) -> None:
        """Opens connections ahead of need, as many as the target will take."""
        if not self._keep_alive:
            return
        try:
            opened = [await self.acquire(fresh=True) for _ in range(count)]
        except ConnectError:
            return
        self._idle += [(perf_counter(), connection) for connection, _ in opened]

    def release(self, connection: Connection) -> None:
        """Keeps the connection for the next request if it can serve one."""
        if self._keep_alive and connection.reusable:
            self._idle.append((perf_counter(), connection))
        else:
            connection.abort()

    async def fetch(
        self, method: str, path: str, body: bytes = b""
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain request: (status, headers, body).

        Raises:
            ConnectError, ConnectionLostError, ProtocolError
        """
        answer = _Buffer()
        connection, _ = await self.acquire()
        await connection.exchange(self.encode(method, path, body), answer)
        self.release(connection)
        return answer.status, answer.headers, bytes(answer.body)

    def close(self) -> None:
        for _, connection in self._idle:
            connection.abort()
        self._idle.clear()


class _Buffer:
    """A sink that keeps the whole answer."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = bytearray()

    def on_headers(self, stamp: float, status: int, headers: dict[str, str]) -> None:
        self.status, self.headers = status, headers

    def on_body(self, stamp: float, data: bytes) -> None:
        self.body += data
