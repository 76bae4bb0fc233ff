"""Clients that misbehave on the wire, over real sockets, a real engine behind them.

Breaks for: everybody else on the server, if such a client could hold the engine, memory or a place
in the queue, or slip a request past whoever stands before the server.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from asgi_call import WAIT
from convserve.server.connections import BoundedConnection
from real_app import RealApp, real_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True, "logprobs": 20}


class Wire:
    """A real app behind a real port."""

    def __init__(self, served: RealApp, port: int) -> None:
        self.served = served
        self._port = port

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A blocking connection to it."""
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect(("127.0.0.1", self._port))
        sock.settimeout(WAIT)
        return sock

    async def talk(self, data: bytes) -> bytes:
        """Sends `data` as it is; everything that comes back until the server closes."""
        with self.connect() as sock:
            await asyncio.to_thread(sock.sendall, data)
            return await asyncio.to_thread(_read_all, sock)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT):
            while not condition():
                await asyncio.sleep(0.01)


def _read_all(sock: socket.socket) -> bytes:
    received = b""
    try:
        while piece := sock.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def request(body: dict[str, Any] | bytes, *headers: str, length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        "POST /v1/completions HTTP/1.1",
        "Host: test",
        "Content-Type: application/json",
        f"Content-Length: {len(data) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


@asynccontextmanager
async def wired(**options: Any) -> AsyncIterator[Wire]:
    """Ends with an engine that is idle and still says what it said before."""
    async with real_app(**options) as served:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)  # its children inherit
            listener.bind(("127.0.0.1", 0))
            config = uvicorn.Config(
                served.app,
                http=BoundedConnection,
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
            )
            server = uvicorn.Server(config)
            serving = asyncio.create_task(server.serve([listener]))
            while not server.started:
                await asyncio.sleep(0.005)
            wire = Wire(served, listener.getsockname()[1])
            yield wire
            await wire.until(lambda: served.is_idle)
            assert await served.sing() == served.song
            server.should_exit = True
            await serving


def figure(served: RealApp, name: str) -> float:
    text = served.app.state.service.metrics.render().decode()
    [line] = [line for line in text.splitlines() if line.startswith(f"convserve_{name}{{")]
    return float(line.split()[-1])


async def test_a_client_that_never_reads_is_dropped() -> None:
    async with wired(send_seconds=0.2) as wire:
        with wire.connect(receive_buffer=2048) as sock:
            await asyncio.to_thread(sock.sendall, request(LONG))
            async with wire.served.beside_canary():
                await wire.until(lambda: figure(wire.served, "slow_readers_total") == 1)


async def test_a_client_that_resets_in_mid_stream_frees_the_engine() -> None:
    async with wired() as wire:
        socks = [wire.connect() for _ in range(3)]
        for sock in socks:
            await asyncio.to_thread(sock.sendall, request(LONG))
        async with wire.served.beside_canary():
            for sock in socks:
                assert await asyncio.to_thread(sock.recv, 100)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()  # RST
        await wire.until(lambda: figure(wire.served, "client_disconnects_total") == 3)


async def test_a_client_that_has_said_all_may_close_its_side() -> None:
    """Half a connection is closed by some well-meaning clients; they still get their answer, or
    the connection ends, and the engine is free in either case."""
    async with wired() as wire:
        with wire.connect() as sock:
            await asyncio.to_thread(sock.sendall, request({**LONG, "max_tokens": 20}))
            sock.shutdown(socket.SHUT_WR)
            async with wire.served.beside_canary():
                await asyncio.to_thread(_read_all, sock)


async def test_a_body_that_stops_half_way_is_a_408_and_holds_no_place() -> None:
    async with wired(body_seconds=0.2) as wire:
        async with wire.served.beside_canary():
            reply = await wire.talk(request({"prompt": "a"}, length=1000))
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert reply.count(b"HTTP/1.1 ") == 1


async def test_a_body_longer_than_it_said_is_not_a_second_request() -> None:
    hidden = b"POST /reset_prefix_cache HTTP/1.1\r\nHost: x\r\n\r\n"
    async with wired() as wire:
        body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
        short = request(body, "Connection: close")
        async with wire.served.beside_canary():
            reply = await wire.talk(short + hidden)
        assert reply.startswith(b"HTTP/1.1 200 ")
        assert reply.count(b"HTTP/1.1 ") == 1


SMUGGLED = [
    ("Transfer-Encoding: chunked",),
    ("Transfer-Encoding: xchunked",),
    ("Transfer-Encoding : chunked",),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: identity"),
    ("Content-Length: 5",),
    ("Content-Length: +5",),
    ("X: a\n b",),
    ("X: a\x00b",),
    ("X\x01: a",),
    (" folded: a",),
]


async def test_two_ways_to_read_a_length_are_none() -> None:
    """Whoever reads the head otherwise than a proxy before it would see another request in it."""
    hidden = b"0\r\n\r\nGET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    async with wired() as wire, wire.served.beside_canary():
        for headers in SMUGGLED:
            reply = await wire.talk(request(hidden, *headers))
            assert reply.startswith(b"HTTP/1.1 400 "), (headers, reply[:200])
            assert reply.count(b"HTTP/1.1 ") == 1, headers
            assert b'"version"' not in reply, headers


async def test_a_header_cannot_end_a_header() -> None:
    async with wired() as wire:
        reply = await wire.talk(
            request(
                {"prompt": "a", "max_tokens": 1},
                "X-Request-Id: a%0d%0aSet-Cookie: x",
                "Connection: close",
            )
        )
        head = reply.partition(b"\r\n\r\n")[0].lower()
        assert reply.startswith(b"HTTP/1.1 200 ")
        assert b"set-cookie" not in head
