"""An engine in a process of its own, as the server uses it: its own interpreter, its own death.

The process is joined by a unix socket in a private folder. Frames are schema-checked msgpack; no
pickle anywhere. This module does not import torch.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .client import EngineStartError
from .messages import (
    EngineCommand,
    EngineFailed,
    EngineInfo,
    Shutdown,
)
from .streams import RequestStreams
from .wire import frame, read_frame, reply_decoder

if TYPE_CHECKING:
    from .config import EngineConfig

EXIT_SECONDS = 5.0
"""How long a process that was told to shut down may take before it is killed."""


class ProcessClient(RequestStreams):
    """An `EngineClient` over an engine process."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        super().__init__(info, self._write)
        self._ended = asyncio.Event()
        self._task = asyncio.create_task(self._receive())

    @classmethod
    async def start(cls, config: EngineConfig) -> ProcessClient:
        """Starts a process and waits until its engine can take requests.

        Raises:
            EngineStartError: it cannot; the message is one line.
        """
        folder = Path(tempfile.mkdtemp(prefix="convserve-"))  # mode 0700
        try:
            connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]]
            connected = asyncio.get_running_loop().create_future()
            path = folder / "engine.sock"

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                if not connected.done():
                    connected.set_result((reader, writer))

            server = await asyncio.start_unix_server(accept, path)
            async with server:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    f"{__package__}.worker",
                    str(path),
                    stdin=asyncio.subprocess.DEVNULL,
                    # OpenMP threads that spin between operations take cores from this process.
                    env={"GOMP_SPINCOUNT": "0", **os.environ},
                )
                try:
                    return await cls._join(process, connected, config)
                except BaseException:
                    if process.returncode is None:
                        process.kill()
                        await process.wait()
                    raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    async def _join(
        cls,
        process: asyncio.subprocess.Process,
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]],
        config: EngineConfig,
    ) -> ProcessClient:
        exited = asyncio.create_task(process.wait())
        await asyncio.wait({connected, exited}, return_when=asyncio.FIRST_COMPLETED)
        if not connected.done():
            raise EngineStartError(f"the engine process ended with code {process.returncode}")
        exited.cancel()
        reader, writer = connected.result()
        writer.write(frame(config))
        try:
            reply = reply_decoder.decode(await read_frame(reader))
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await process.wait()
            raise EngineStartError(f"the engine process ended with code {code}") from None
        if isinstance(reply, EngineFailed):
            await process.wait()
            raise EngineStartError(reply.message)
        assert isinstance(reply, EngineInfo), f"unexpected first reply {type(reply).__name__}"
        return cls(process, reader, writer, reply)

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    async def wait_dead(self) -> int | None:
        """See `EngineClient`."""
        await self._ended.wait()
        return await self._process.wait()

    async def close(self) -> None:
        """See `EngineClient`."""
        self.end_streams()
        self._write(Shutdown())
        try:
            await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
        except TimeoutError:
            self._process.kill()
        await self._task
        self._writer.close()

    def _write(self, command: EngineCommand) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(command))

    async def _receive(self) -> None:
        try:
            while True:
                reply = reply_decoder.decode(await read_frame(self._reader))
                assert not isinstance(reply, (EngineInfo, EngineFailed))
                self.receive(reply)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.die("the engine process ended")
            self._ended.set()
