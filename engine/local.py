"""An engine in a thread of this process: for tests and small tools."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from typing import TYPE_CHECKING

from .loop import run_loop
from .messages import EngineCommand, EngineReply, Heartbeat, Shutdown, StepReport
from .streams import RequestStreams

if TYPE_CHECKING:
    from .core import EngineCore
    from .messages import EngineInfo

_log = logging.getLogger(__name__)


class LocalClient(RequestStreams):
    """An `EngineClient` over an EngineCore of this process. Create it on a running event loop."""

    def __init__(self, core: EngineCore, info: EngineInfo) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._inbox: queue.SimpleQueue[EngineCommand] = queue.SimpleQueue()
        super().__init__(info, self._inbox.put)
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(core, info), daemon=True)
        self._thread.start()

    async def wait_dead(self) -> int | None:
        """See `EngineClient`."""
        await self._ended.wait()
        return None

    async def close(self) -> None:
        """See `EngineClient`."""
        self.end_streams()
        self._inbox.put(Shutdown())
        await asyncio.to_thread(self._thread.join)

    def _run(self, core: EngineCore, info: EngineInfo) -> None:
        why = "the engine was shut down"
        try:
            run_loop(core, info, self._inbox, self._deliver)
        except Exception as error:  # whatever it was, nobody may be left waiting
            _log.exception("the engine failed")
            why = f"the engine failed: {type(error).__name__}: {error}"
        finally:
            self._event_loop.call_soon_threadsafe(self._end, why)

    def _deliver(self, reply: EngineReply) -> None:
        assert isinstance(reply, (StepReport, Heartbeat))
        self._event_loop.call_soon_threadsafe(self.receive, reply)

    def _end(self, why: str) -> None:
        self.die(why)
        self._ended.set()
