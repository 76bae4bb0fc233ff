"""Whether the server takes work, and how much of it is inside.

Knows nothing of what the work is. One object of these per app; only the event loop touches it.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from .errors import draining, engine_dead, overloaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..engine.client import EngineClient
    from .metrics import Metrics


class Lifecycle:
    """Admission by count: sequences live in the server, bounded; none while on the way out."""

    def __init__(self, client: EngineClient, max_queue: int, stale_seconds: float) -> None:
        """At most `max_queue` sequences beyond those the engine can run at once."""
        self._client = client
        self._stale_seconds = stale_seconds
        self.max_running = client.info.max_num_seqs
        self.capacity = self.max_running + max_queue
        self.live = 0
        """Sequences admitted and not yet done."""
        self.requests = 0
        """Requests that hold them."""
        self.is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_live(self) -> bool:
        """The engine runs and has been heard of lately."""
        return self._client.is_alive and self._client.heartbeat_age <= self._stale_seconds

    @property
    def is_ready(self) -> bool:
        """Live, and new work is taken."""
        return self.is_live and not self.is_draining

    def check(self, sequences: int, metrics: Metrics) -> None:
        """Raises ApiError if `sequences` more cannot be taken now: 429 or 503."""
        if not self._client.is_alive:
            metrics.rejected["engine_dead"].inc()
            raise engine_dead()
        if self.is_draining:
            metrics.rejected["draining"].inc()
            raise draining()
        if self.live + sequences > self.capacity:
            metrics.rejected["queue_full"].inc()
            waves = (self.live + sequences) // max(self.max_running, 1)
            raise overloaded(retry_after=min(1 + waves, 60))

    @contextlib.contextmanager
    def admitted(self, sequences: int, metrics: Metrics) -> Iterator[None]:
        """Holds a place for `sequences` while the body runs; raises as `check`."""
        self.check(sequences, metrics)
        self.live += sequences
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.live -= sequences
            self.requests -= 1
            if not self.requests:
                self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Takes no more work and waits for what is inside; False if it did not end in time."""
        self.is_draining = True
        return await self.idle(seconds)

    async def idle(self, seconds: float) -> bool:
        """Waits until nothing is inside; False if that took longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
