"""A server process over a real socket, with the scripted engine: start, drain, death, exit codes.

Breaks for: supervisors, which act on exit codes, and clients of a server that goes away.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
from asgi_call import events
from convserve.engine.client import EngineStartError
from convserve.engine.config import EngineConfig
from convserve.server import serve as serve_module
from convserve.server.banner import banner
from convserve.server.serve import ListenOptions, run
from convserve.server.settings import ServerSettings
from fake_engine import INFO, FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
SETTINGS = ServerSettings(model_names=("tiny",))
ASK = {"prompt": "a", "stream": True}


class Stage:
    """Runs a server whose engine is scripted while `play` acts as its client."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.verify: bool | ssl.SSLContext = True
        self.players: list[asyncio.Task[None]] = []

    def run(
        self,
        engine: FakeEngine,
        play: Any,
        uds: Path | None = None,
        settings: ServerSettings = SETTINGS,
        **listen: Any,
    ) -> int:
        stage = self
        engine.info = serve_module.msgspec.structs.replace(INFO, model=str(FOLDER))

        class Client:
            @staticmethod
            async def start(_: EngineConfig) -> FakeEngine:
                stage.players.append(asyncio.create_task(stage._act(engine, play, uds)))
                return engine

        self._monkeypatch.setattr(serve_module, "ProcessClient", Client)
        listening = ListenOptions(port=0, uds=uds, **listen)
        code = run(EngineConfig(model=str(FOLDER)), settings, listening)
        for player in self.players:
            player.result()
        return code

    async def _act(self, engine: FakeEngine, play: Any, uds: Path | None) -> None:
        transport = None if uds is None else httpx.AsyncHTTPTransport(uds=str(uds))
        async with asyncio.timeout(10):
            while not (url := "http://unix" if uds is not None and uds.exists() else self.url()):
                await asyncio.sleep(0.01)
            options = {"base_url": url, "transport": transport, "verify": self.verify}
            async with httpx.AsyncClient(**options) as client:
                await play(engine, client)

    def url(self) -> str | None:
        """Where the banner said that it listens."""
        words = self.banner().split()
        return next((word for word in words if re.match("https?://127", word)), None)

    banner: Callable[[], str]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Stage:
    made = Stage(monkeypatch)
    text: list[str] = []

    def banner() -> str:
        text.append(capsys.readouterr().err)
        return "".join(text)

    made.banner = banner
    return made


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_lets_streams_end_and_exits_0(stage: Stage) -> None:
    async def play(engine: FakeEngine, client: httpx.AsyncClient) -> None:
        assert (await client.get("/ready")).status_code == 200
        async with client.stream("POST", "/v1/completions", json=ASK) as reply:
            pieces = reply.aiter_bytes()
            received = await anext(pieces)
            terminate()
            while (await client.get("/ready")).status_code == 200:
                await asyncio.sleep(0.01)
            assert (await client.post("/v1/completions", json=ASK)).status_code == 503
            engine.auto = True
            engine._schedule()
            received += b"".join([piece async for piece in pieces])
        found = events(received)
        assert found[-1] == "[DONE]"
        assert "".join(chunk["choices"][0]["text"] for chunk in found[:-1]) == "hi"

    engine = FakeEngine("hi", auto=False)

    async def first_step(engine: FakeEngine, client: httpx.AsyncClient) -> None:
        player = asyncio.create_task(play(engine, client))
        while engine.live == 0:
            await asyncio.sleep(0.001)
        engine.step()
        await player

    assert stage.run(engine, first_step) == 0
    assert "serves tiny at http://127.0.0.1:" in stage.banner()


def test_a_stream_that_outlasts_the_drain_is_ended_with_an_error_event(stage: Stage) -> None:
    async def play(engine: FakeEngine, client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/completions", json=ASK))
        while engine.live == 0:
            await asyncio.sleep(0.001)
        engine.step()
        terminate()
        *_, error, done = events((await asking).content)
        assert (error["error"]["code"], done) == (503, "[DONE]")

    assert stage.run(FakeEngine("hi", auto=False), play, drain_seconds=0.1) == 0


def test_asked_twice_it_does_not_wait(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    async def play(engine: FakeEngine, client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/completions", json=ASK))
        while engine.live == 0:
            await asyncio.sleep(0.001)
        engine.step()
        terminate()
        while (await client.get("/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        terminate()
        *_, error, done = events((await asking).content)
        assert (error["error"]["code"], done) == (503, "[DONE]")

    assert stage.run(FakeEngine("hi", auto=False), play, drain_seconds=60) == 0
    assert not [record for record in caplog.records if record.exc_info]


def test_the_engines_death_ends_streams_and_exits_3(stage: Stage) -> None:
    async def play(engine: FakeEngine, client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/completions", json=ASK))
        while engine.live == 0:
            await asyncio.sleep(0.001)
        engine.step()
        engine.die()
        *_, error, done = events((await asking).content)
        assert (error["error"]["code"], done) == (503, "[DONE]")

    assert stage.run(FakeEngine("hi", auto=False), play) == 3


def test_a_disconnect_over_a_socket_frees_the_engine(stage: Stage) -> None:
    async def play(engine: FakeEngine, client: httpx.AsyncClient) -> None:
        asking = asyncio.create_task(client.post("/v1/completions", json=ASK))
        while engine.live == 0:
            await asyncio.sleep(0.001)
        asking.cancel()
        while engine.live:
            await asyncio.sleep(0.001)
        terminate()

    assert stage.run(FakeEngine(auto=False), play) == 0


def test_a_unix_socket(stage: Stage, tmp_path: Path) -> None:
    async def play(_: FakeEngine, client: httpx.AsyncClient) -> None:
        reply = await client.post("/v1/completions", json={"prompt": "a"})
        assert reply.json()["choices"][0]["text"] == "hi"
        terminate()

    assert stage.run(FakeEngine("hi"), play, uds=tmp_path / "s") == 0


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody signed, and its key."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("there is no openssl")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, "req", "-x509", *kind, *names, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def test_tls(stage: Stage, certificate: tuple[Path, Path]) -> None:
    async def play(_: FakeEngine, client: httpx.AsyncClient) -> None:
        assert client.base_url.scheme == "https"
        reply = await client.post("/v1/completions", json={"prompt": "a"})
        assert reply.json()["choices"][0]["text"] == "hi"
        with pytest.raises(httpx.TransportError):
            await client.get(f"http://127.0.0.1:{client.base_url.port}/health")
        terminate()

    cert, key = certificate
    stage.verify = ssl.create_default_context(cafile=str(cert))
    assert stage.run(FakeEngine("hi"), play, ssl_certfile=cert, ssl_keyfile=key) == 0


def test_a_certificate_that_does_not_fit_is_told_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    certificate: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    cert, key = certificate
    unreachable = AssertionError("the engine was started")
    (tmp_path / "empty").touch()
    for pair, said in (
        ((tmp_path / "none", key), "none: no such file"),
        ((cert, tmp_path / "none"), "none: no such file"),
        ((key, key), "not a certificate and its key"),
        ((cert, tmp_path / "empty"), "not a certificate and its key"),
    ):
        listen = ListenOptions(port=0, ssl_certfile=pair[0], ssl_keyfile=pair[1])
        assert start(monkeypatch, unreachable, listen) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_the_banner_says_what_fits() -> None:
    info = msgspec.structs.replace(INFO, conv="lowrank, width 4", num_tails=32)
    engine = EngineConfig(model="", prefix_caching=False)
    text = "\n".join(banner(info, engine, SETTINGS, "http://127.0.0.1:1"))
    for fact in (
        "serves tiny at http://127.0.0.1:1", "model   llama, conv lowrank, width 4, 1.0 MiB",
        "device  cpu, float32", "64 pages of 16 tokens (1.0 MiB, 1.0 KiB a token)",
        "prefix caching off", "4 slots, each 4.0 KiB of convolutions; 32 tails",
        "4 of them at the full 256 tokens",
        "page    http://127.0.0.1:1/",
    ):  # fmt: skip
        assert fact in text
    hybrid = msgspec.structs.replace(info, recurrent_bytes_per_sequence=2048)
    text = "\n".join(banner(hybrid, engine, SETTINGS, "unix:/s"))
    assert "each 4.0 KiB of convolutions and 2.0 KiB of recurrence" in text
    plain = msgspec.structs.replace(INFO, conv_bytes_per_sequence=0)
    text = "\n".join(banner(plain, engine, SETTINGS, "unix:/s"))
    assert "slots" not in text
    assert "page    " not in text


def test_traces_that_cannot_be_sent_are_told_and_exit_1(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    settings = msgspec.structs.replace(
        SETTINGS, otlp_traces_endpoint="http://127.0.0.1:9/v1/traces"
    )

    class Client:
        @staticmethod
        async def start(_: EngineConfig) -> FakeEngine:
            return FakeEngine()

    monkeypatch.setattr(serve_module, "ProcessClient", Client)
    assert run(EngineConfig(model=str(FOLDER)), settings, ListenOptions(port=0)) == 1
    assert "needs OpenTelemetry: pip install convserve[otel]" in capsys.readouterr().err


def start(monkeypatch: pytest.MonkeyPatch, error: Exception, listen: ListenOptions) -> int:
    class Client:
        @staticmethod
        async def start(_: EngineConfig) -> FakeEngine:
            raise error

    monkeypatch.setattr(serve_module, "ProcessClient", Client)
    return run(EngineConfig(model=str(FOLDER)), SETTINGS, listen)


def test_an_engine_that_does_not_start_is_one_line_and_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = EngineStartError("model.safetensors: tensor x is missing")
    assert start(monkeypatch, error, ListenOptions(port=0)) == 1
    assert capsys.readouterr().err == "convserve: model.safetensors: tensor x is missing\n"


def test_a_place_that_is_taken_is_told_before_the_engine_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    unreachable = AssertionError("the engine was started")
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket(socket.AF_UNIX) as other:
        port = taken.getsockname()[1]
        assert start(monkeypatch, unreachable, ListenOptions(port=port)) == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already" in capsys.readouterr().err
        other.bind(str(tmp_path / "taken"))
        other.listen()
        for name, said in (("taken", "another server"), ("no/where", "does not exist")):
            assert start(monkeypatch, unreachable, ListenOptions(uds=tmp_path / name)) == 1
            assert said in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    assert start(monkeypatch, unreachable, ListenOptions(uds=tmp_path / "file")) == 1
    assert "not a socket" in capsys.readouterr().err
    (tmp_path / "file").read_text()
    assert start(monkeypatch, unreachable, ListenOptions(host="no.such.host.invalid")) == 1
    assert "cannot listen on no.such.host.invalid:8000: " in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_does_not_open_the_port(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine = FakeEngine()
    engine.info = serve_module.msgspec.structs.replace(INFO, model=str(tmp_path))

    class Client:
        @staticmethod
        async def start(_: EngineConfig) -> FakeEngine:
            return engine

    monkeypatch.setattr(serve_module, "ProcessClient", Client)
    assert run(EngineConfig(model=str(tmp_path)), SETTINGS, ListenOptions(port=0)) == 1
    assert "tokenizer.json: no such file" in capsys.readouterr().err
    assert not engine.is_alive
