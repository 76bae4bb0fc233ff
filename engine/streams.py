"""Open requests on the client's side: who waits for which events, and how each of them ends."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from .client import EngineDeadError
from .messages import (
    AbortRequest,
    EngineCommand,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Heartbeat,
    ResetPrefixCache,
    StepReport,
    TokenEvent,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


class _Stream:
    """What has come for one request and was not taken; asyncio's queue hands out one at a time."""

    def __init__(self, choices: int) -> None:
        self.open = set(range(choices))
        self.events: list[TokenEvent | EngineDeadError | None] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: TokenEvent | EngineDeadError | None) -> None:
        self.events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[TokenEvent | EngineDeadError | None]:
        """Everything that is there, as soon as something is."""
        if not self.events:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        taken, self.events = self.events, []
        return taken


class RequestStreams:
    """Routes reports to the iterators that wait for them. Lives on one event loop.

    The half of an `EngineClient` that does not depend on where the engine is.
    """

    def __init__(self, info: EngineInfo, send: Callable[[EngineCommand], None]) -> None:
        """`send` passes a command to the engine and never blocks."""
        self.info = info
        self.stats = EngineStats(pages_total=info.num_pages, slots_total=info.max_num_seqs)
        self._send = send
        self._streams: dict[str, _Stream] = {}
        self._watch: Callable[[EngineStats], None] = lambda _: None
        self._death: EngineDeadError | None = None
        self._heard_at = time.monotonic()

    @property
    def is_alive(self) -> bool:
        """The engine is not known to be gone."""
        return self._death is None

    @property
    def heartbeat_age(self) -> float:
        """Seconds since the engine last said anything."""
        return time.monotonic() - self._heard_at

    async def submit(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `EngineClient.submit`."""
        if self._death is not None:
            raise self._death
        stream = _Stream(request.params.n)
        assert request.request_id not in self._streams, "request ids are unique"
        self._streams[request.request_id] = stream
        self._send(request)
        try:
            while True:
                event: TokenEvent | None = None
                for after in await stream.take():
                    # A reader that is behind the engine gets what has queued up as one event:
                    # writing it token by token would keep it behind.
                    if event is not None:
                        if isinstance(after, TokenEvent) and _continues(event, after):
                            event = _joined(event, after)
                            continue
                        yield event
                    if after is None:
                        return
                    if isinstance(after, EngineDeadError):
                        raise after
                    event = after
                assert event is not None
                yield event
                if not stream.open and not stream.events:
                    return
        finally:
            del self._streams[request.request_id]
            if stream.open and self._death is None:
                self._send(AbortRequest(request.request_id))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """See `EngineClient.abort`."""
        stream = self._streams.get(request_id)
        if stream is None or self._death is not None:
            return
        gone = stream.open if index is None else stream.open & {index}
        if not gone:
            return
        stream.open = stream.open - gone
        self._send(AbortRequest(request_id, index))
        if not stream.open:
            stream.put(None)

    def reset_prefix_cache(self) -> None:
        """See `EngineClient.reset_prefix_cache`."""
        if self._death is None:
            self._send(ResetPrefixCache())

    def watch_stats(self, watch: Callable[[EngineStats], None]) -> None:
        """See `EngineClient.watch_stats`."""
        self._watch = watch

    def receive(self, report: StepReport | Heartbeat) -> None:
        """Takes a report of the engine in."""
        self._heard_at = time.monotonic()
        self.stats = report.stats
        self._watch(report.stats)
        if isinstance(report, Heartbeat):
            return
        for event in report.events:
            stream = self._streams.get(event.request_id)
            # Events of choices that were aborted may still be on their way.
            if stream is None or event.index not in stream.open:
                continue
            if event.finish_reason is not None:
                stream.open = stream.open - {event.index}
            stream.put(event)

    def end_streams(self) -> None:
        """Ends every open request with `abort`: the engine is being shut down."""
        for request_id, stream in self._streams.items():
            for index in sorted(stream.open):
                stream.put(TokenEvent(request_id, index, finish_reason="abort"))
            stream.open = set()
        self.die("the engine was shut down")

    def die(self, why: str) -> None:
        """Tells every waiter, now and later, that the engine is gone."""
        if self._death is not None:
            return
        self._death = EngineDeadError(why)
        for stream in self._streams.values():
            if stream.open:
                stream.put(self._death)


def _continues(event: TokenEvent, after: TokenEvent) -> bool:
    """Whether both can be told as one."""
    return after.index == event.index and after.finish_reason not in ("abort", "error")


def _joined(event: TokenEvent, after: TokenEvent) -> TokenEvent:
    return msgspec.structs.replace(
        event,
        token_ids=event.token_ids + after.token_ids,
        logprobs=event.logprobs + after.logprobs,
        finish_reason=after.finish_reason,
        stop_token=after.stop_token,
    )
