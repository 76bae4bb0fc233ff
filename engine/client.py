"""How the server talks to the engine: submit, iterate events, abort, close.

Two ways to reach an engine share this interface: `process.ProcessClient` (its own process, joined
by a unix socket) and `local.LocalClient` (a thread of this process; tests and the offline `LLM`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from .messages import EngineInfo, EngineStats, GenerateRequest, TokenEvent


class EngineDeadError(RuntimeError):
    """The engine is gone; raised to every waiter at once and to every later submit."""


class EngineStartError(RuntimeError):
    """The engine refused to start; the message is one line fit for a person."""


class EngineClient(Protocol):
    """An engine that is ready to take requests."""

    @property
    def info(self) -> EngineInfo:
        """What the engine serves."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest figures the engine sent."""
        ...

    @property
    def is_alive(self) -> bool:
        """False from the moment the engine is known to be gone."""
        ...

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine last said anything (it does so at least every second)."""
        ...

    def submit(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """Starts a request and yields its events, of all its choices, until all have finished.

        Closing the iterator early (or cancelling the task that reads it) aborts the request.

        Raises:
            EngineDeadError: the engine died, before or while the request ran.
        """
        ...

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stops a request, or one choice of it (a stop string was found). Sends no event; the
        iterator ends when every choice has finished or been aborted."""
        ...

    def reset_prefix_cache(self) -> None:
        """Has the engine forget, before its next step, every cached prefix that no running request
        owns."""
        ...

    def watch_stats(self, watch: Callable[[EngineStats], None]) -> None:
        """Has `watch` called with the figures of every report from now on; it must not fail."""
        ...

    async def wait_dead(self) -> int | None:
        """Returns when the engine is gone, with its exit code if it was a process."""
        ...

    async def close(self) -> None:
        """Shuts the engine down; open requests end with finish_reason `abort`."""
        ...
