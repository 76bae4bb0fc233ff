"""A server process's life: bind, start the engine, serve, drain or die.

Knows nothing of flags or of requests. Exit codes: 0 asked to stop, 1 could not start, 3 the engine
died.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvicorn

from ..engine.client import EngineStartError
from ..engine.process import ProcessClient
from .app import create_app
from .banner import banner
from .connections import BoundedConnection
from .tracing import RequestTraces, TracingError, open_traces

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from ..engine.config import EngineConfig
    from ..engine.messages import EngineInfo
    from .lifecycle import Lifecycle
    from .settings import ServerSettings

_log = logging.getLogger("convserve.server")
_FLUSH_SECONDS = 5.0
"""Time for open streams to tell of the engine's end."""
EXIT_STOPPED, EXIT_NO_START, EXIT_ENGINE_DIED = 0, 1, 3


class ListenOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where and how the server listens and stops."""

    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    """A unix socket instead of host and port."""
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None
    drain_seconds: float = 30.0
    """How long requests in flight may go on after SIGTERM."""


class StartError(Exception):
    """The server cannot start; one line fit for a person."""


def run(engine: EngineConfig, settings: ServerSettings, listen: ListenOptions) -> int:
    """Serves until told to stop; returns the exit code."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):  # not on Windows
        import uvloop

        factory = uvloop.new_event_loop
    try:
        _check_tls(listen)
        with _listening(listen) as sock, asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(_Process(engine, settings, listen, sock).live())
    except (StartError, EngineStartError) as error:
        sys.stderr.write(f"convserve: {error}\n")
        return EXIT_NO_START


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: this module decides when to stop."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


class _Process:
    """One run."""

    def __init__(
        self,
        engine: EngineConfig,
        settings: ServerSettings,
        listen: ListenOptions,
        sock: socket.socket | None,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._listen = listen
        self._sock = sock
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def live(self) -> int:
        """Start to end; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        stop = asyncio.create_task(self._stop.wait())
        start = asyncio.create_task(ProcessClient.start(self._engine))
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not start.done():
            start.cancel()
            await asyncio.wait({start})
            return EXIT_STOPPED
        client = start.result()
        try:
            return await self._serve(client, stop)
        finally:
            stop.cancel()
            await client.close()

    def _on_signal(self) -> None:
        if self._stop.is_set():  # asked twice: now
            self._hurry.set()
        self._stop.set()

    async def _serve(self, client: ProcessClient, stop: asyncio.Task[bool]) -> int:
        traces = self._traces()
        try:
            app = create_app(client, Path(client.info.model), self._settings, traces)
        except ValueError as error:
            raise StartError(str(error)) from None
        lifecycle: Lifecycle = app.state.service.lifecycle
        server = _Server(self._uvicorn_config(app), lambda: self._greet(client.info))
        sockets = None if self._sock is None else [self._sock]
        serving = asyncio.create_task(server.serve(sockets))
        dead = asyncio.create_task(client.wait_dead())
        try:
            await asyncio.wait({serving, dead, stop}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                raise StartError(f"cannot serve: {serving.exception()}")
            if not dead.done() and await self._drain(client, lifecycle, serving, dead):
                return EXIT_STOPPED
            _log.error("the engine died")
            await lifecycle.idle(_FLUSH_SECONDS)
            return EXIT_ENGINE_DIED
        finally:
            server.should_exit = True
            await asyncio.wait({serving})
            dead.cancel()
            if traces is not None:
                await asyncio.to_thread(traces.close)

    def _traces(self) -> RequestTraces | None:
        endpoint = self._settings.otlp_traces_endpoint
        if endpoint is None:
            return None
        try:
            return open_traces(endpoint, self._settings.model_names[0])
        except TracingError as error:
            raise StartError(str(error)) from None

    async def _drain(
        self,
        client: ProcessClient,
        lifecycle: Lifecycle,
        serving: asyncio.Task[None],
        dead: asyncio.Task[int | None],
    ) -> bool:
        """Waits until what was in flight has ended, by itself or by force; False if the engine
        died first."""
        _log.info("draining: %d requests in flight", lifecycle.requests)
        drain = asyncio.create_task(lifecycle.drain(self._listen.drain_seconds))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, dead, serving, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if dead.done():
            drain.cancel()
            return False
        if lifecycle.requests:
            _log.warning("%d requests did not end in time", lifecycle.requests)
            await client.close()
            await lifecycle.idle(_FLUSH_SECONDS)
        drain.cancel()
        return True

    def _uvicorn_config(self, app: Any) -> uvicorn.Config:
        listen = self._listen
        return uvicorn.Config(
            app,
            uds=None if listen.uds is None else str(listen.uds),
            http=BoundedConnection,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(_FLUSH_SECONDS),
            ssl_certfile=listen.ssl_certfile,
            ssl_keyfile=listen.ssl_keyfile,
        )

    def _url(self) -> str:
        """Where clients find the server."""
        if self._sock is None:
            return f"unix:{self._listen.uds}"
        scheme = "http" if self._listen.ssl_certfile is None else "https"
        host, port = self._sock.getsockname()[:2]
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def _greet(self, info: EngineInfo) -> None:
        lines = banner(info, self._engine, self._settings, self._url())
        listen = self._listen
        if not self._settings.api_keys and listen.uds is None and not _is_loopback(listen.host):
            lines.append("  note    no --api-key: whoever reaches this address may use it")
        sys.stderr.write("\n".join(lines) + "\n")


@contextlib.contextmanager
def _listening(listen: ListenOptions) -> Iterator[socket.socket | None]:
    """The bound socket, not yet listening; None for a unix socket, which is only checked."""
    if listen.uds is not None:
        _check_unix_path(listen.uds)
        yield None
        return
    where = f"{listen.host}:{listen.port}"
    try:
        found = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartError(f"cannot listen on {where}: {error.strerror or error}") from None
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            raise StartError(f"cannot listen on {where}: {error.strerror or error}") from None
        sock.setblocking(False)
        yield sock


def _check_tls(listen: ListenOptions) -> None:
    """Reads certificate and key, so that a wrong one is told before the model is loaded."""
    if listen.ssl_certfile is None or listen.ssl_keyfile is None:
        return
    for path in (listen.ssl_certfile, listen.ssl_keyfile):
        if not path.is_file():
            raise StartError(f"{path}: no such file")
    pair = f"{listen.ssl_certfile} and {listen.ssl_keyfile}"
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(listen.ssl_certfile, listen.ssl_keyfile, password=lambda: "")
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise StartError(
            f"{pair}: not a certificate and its key without a password, in PEM ({reason})"
        ) from None


def _check_unix_path(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise StartError(f"cannot listen on {path}: its folder does not exist") from None
        return
    except OSError as error:
        raise StartError(f"cannot listen on {path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise StartError(f"cannot listen on {path}: a file that is not a socket is there")
    with socket.socket(socket.AF_UNIX) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise StartError(f"cannot listen on {path}: another server does")


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
