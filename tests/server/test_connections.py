"""Connections over a real socket whose clients are slow, endless, or do not speak HTTP.

Breaks for: everyone else on the server, when a few such clients hold its memory or descriptors.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from convserve.server import connections
from fake_engine import FakeEngine
from uvicorn.server import ServerState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

HEALTH = b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n"
STREAM = (
    b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    b'content-length: 29\r\n\r\n{"prompt":"a","stream": true}'
)


class Peer:
    """A client that writes what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> bytes:
        return await self.reader.readuntil(b"\r\n\r\n")

    async def refusal(self) -> tuple[int, str]:
        """Status and message of the reply, after which the connection must end."""
        head, _, body = (await self.reader.read()).partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower()
        return int(head.split()[1]), json.loads(body)["error"]["message"]


@pytest.fixture
def connect_to(serve: Callable[..., Any]) -> Callable[..., Any]:
    """connect_to(engine) -> async context of a Peer"""

    @asynccontextmanager
    async def connected(engine: FakeEngine) -> AsyncIterator[Peer]:
        config = uvicorn.Config(
            serve(engine), port=0, http=connections.BoundedConnection, log_config=None
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        async with asyncio.timeout(20):
            while not server.started:
                await asyncio.sleep(0.005)
            port = server.servers[0].sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                yield Peer(reader, writer)
            finally:
                writer.close()
                server.should_exit = True
                await serving

    return connected


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads have a tenth of a second."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\n"])
async def test_a_head_without_end(connect_to: Callable[..., Any], start: bytes) -> None:
    async with connect_to(FakeEngine()) as peer:
        await peer.send(start)
        filler = b"a: b\r\n" * 100 if start.endswith(b"1.1\r\n") else b"a" * 600
        for _ in range(69):  # just over the bound, so that everything sent is also read
            await peer.send(filler)
            await asyncio.sleep(0)
        assert await peer.refusal() == (431, "the headers have more than 32768 bytes")


@pytest.mark.usefixtures("hasty")
async def test_a_head_that_is_late(connect_to: Callable[..., Any]) -> None:
    async with connect_to(FakeEngine()) as peer:
        await peer.send(b"GET /health HTTP/1.1\r\nhost")
        assert await peer.refusal() == (408, "the headers took more than 0.1 s")


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("before", [b"", b"\r\n"])
async def test_nothing_is_said_to_who_says_nothing(
    connect_to: Callable[..., Any], before: bytes
) -> None:
    async with connect_to(FakeEngine()) as peer:
        await peer.send(before)
        assert await peer.reader.read() == b""


@pytest.mark.parametrize("said", [b"\x16\x03\x01\x02\x00", b"hello\r\n\r\n", b"GET a b c\r\n\r\n"])
async def test_what_is_not_http(connect_to: Callable[..., Any], said: bytes) -> None:
    async with connect_to(FakeEngine()) as peer:
        await peer.send(said)
        assert await peer.refusal() == (400, "Invalid HTTP request received")


async def test_a_long_url(connect_to: Callable[..., Any]) -> None:
    async with connect_to(FakeEngine()) as peer:
        await peer.send(b"GET /health?" + b"a" * 9000 + b" HTTP/1.1\r\nconnection: close\r\n\r\n")
        assert await peer.refusal() == (414, "the URL has more than 8192 bytes")


@pytest.mark.usefixtures("hasty")
async def test_waiting_between_requests_and_for_replies_is_no_fault(
    connect_to: Callable[..., Any],
) -> None:
    engine = FakeEngine("hi", auto=False)
    async with connect_to(engine) as peer:
        for _ in range(2):
            await peer.send(HEALTH)
            assert (await peer.head()).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(0.15)
        await peer.send(STREAM[:-5])
        await asyncio.sleep(0.15)
        await peer.send(STREAM[-5:])
        while not engine.live:
            await asyncio.sleep(0.001)
        engine.step()
        assert (await peer.head()).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.15)
        engine.step()
        engine.step()
        await peer.reader.readuntil(b"[DONE]")


async def test_a_second_head_without_end_cuts_the_stream_before_it(
    connect_to: Callable[..., Any],
) -> None:
    engine = FakeEngine("hi", auto=False)
    async with connect_to(engine) as peer:
        await peer.send(STREAM)
        while not engine.live:
            await asyncio.sleep(0.001)
        engine.step()
        await peer.reader.readuntil(b'"h"')
        await peer.send(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 8000)
        received = await peer.reader.read()
        assert b"431" not in received
        while engine.live:
            await asyncio.sleep(0.001)


class Pipe(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    async def has(self, part: bytes) -> None:
        """Returns once `part` was written."""
        async with asyncio.timeout(10):
            while part not in self.written:
                await asyncio.sleep(0)


async def test_a_stream_that_waits_for_its_reader_is_counted(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("abc", auto=False)
    app = serve(engine)
    metrics = app.state.service.metrics

    def figures() -> tuple[float, float]:
        """Waits so far, and seconds that they took."""
        text = metrics.render().decode()
        times, seconds = re.findall(r"^convserve_sse_backpressure\w*_total{.*} (\S+)$", text, re.M)
        return float(times), float(seconds)

    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    connection = connections.BoundedConnection(
        config=config, server_state=ServerState(), app_state={"metrics": metrics}
    )
    pipe = Pipe()
    connection.connection_made(pipe)
    connection.data_received(STREAM)
    while not engine.live:
        await asyncio.sleep(0)
    engine.step()
    await pipe.has(b'"a"')
    connection.pause_writing()  # the transport's buffer is full: what comes next must wait
    engine.step()
    async with asyncio.timeout(10):
        while figures() != (1, 0):
            await asyncio.sleep(0)
    assert b'"b"' not in pipe.written
    connection.resume_writing()
    await pipe.has(b'"b"')
    engine.step()
    engine.step()
    await pipe.has(b"[DONE]")
    times, seconds = figures()
    assert times == 1
    assert seconds > 0
    connection.connection_lost(None)
