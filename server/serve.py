"""A server process's life: bind, start the engine, serve, drain or die.

Knows nothing of flags or of requests. Exit codes: 0 asked to stop, 1 could not start, 3 the engine
died.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import uvicorn

from ..engine.client import EngineStartError
from ..engine.process import ProcessClient
from .app import create_app

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
        try:
            app = create_app(client, Path(client.info.model), self._settings)
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
            http="httptools",
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

    def _greet(self, info: EngineInfo) -> None:
        listen, settings = self._listen, self._settings
        scheme = "http" if listen.ssl_certfile is None else "https"
        host, port = ("", 0) if self._sock is None else self._sock.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        url = f"unix:{listen.uds}" if self._sock is None else f"{scheme}://{host}:{port}"
        whole = min(info.num_pages * info.page_size // info.max_model_len, info.max_num_seqs)
        lines = [
            f"convserve {importlib.metadata.version('convserve')} serves "
            f"{', '.join(settings.model_names)} at {url}",
            f"  model   {info.model_type}, conv {info.conv}, {_size(info.weight_bytes)} of weights",
            f"  device  {info.device}, {info.dtype}",
            f"  cache   {info.num_pages} pages of {info.page_size} tokens "
            f"({_size(info.page_pool_bytes)}, {_size(info.kv_bytes_per_token)} a token), "
            f"conv state {_size(info.conv_bytes_per_sequence)} a sequence",
            f"  fits    {info.max_num_seqs} sequences at once, {whole} of them at the full "
            f"{info.max_model_len} tokens",
        ]
        if not settings.api_keys and listen.uds is None and not _is_loopback(listen.host):
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


def _size(number: int) -> str:
    """Bytes for a person."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
