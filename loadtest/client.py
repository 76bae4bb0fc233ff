"""Sends one request and returns its record: the place where every kind of failure gets its name.

Knows the wire fields of the OpenAI API; knows nothing of schedules, workloads or statistics.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from .http import ConnectError, ConnectionLostError, Pool, ProtocolError
from .records import HARMLESS, RequestRecord, pack_counts, pack_offsets
from .stream import EnoughTokens, MalformedError, StreamSink, TokenCounter

if TYPE_CHECKING:
    from collections.abc import Callable

    from .http import Connection, Exchange
    from .records import Outcome

ENDPOINTS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}

_RETRIED = (408, 429, 500, 502, 503, 504)


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What applies to all requests of a run."""

    timeout: float = 300.0
    """Seconds a request may take in all, retries included."""
    connect_timeout: float = 10.0
    retries: int = 0
    """How often a refused or overloaded request is tried again; its time goes on counting."""
    honour_retry_after: bool = True
    keep_alive: bool = True
    vendor_fields: bool = True
    """Ask for token ids and running usage, and send `ignore_eos`: fields beyond OpenAI's own."""


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """One request, ready to send."""

    index: int
    turn: int = 0
    traffic: str = "default"
    endpoint: str
    body: dict[str, Any]
    max_tokens: int
    cancel_after: int | None = None
    read_rate: float | None = None
    keep_output: bool = False
    expected: str | None = None
    """Canary: the only text that is right."""


class Client:
    """Sends requests to one target and stamps them on the run's clock."""

    def __init__(self, pool: Pool, options: ClientOptions) -> None:
        self.pool = pool
        self.options = options
        self.origin = 0.0
        """`perf_counter` of the run's time 0."""
        self.counter = TokenCounter()

    def now(self) -> float:
        """Seconds on the run's clock."""
        return perf_counter() - self.origin

    def _body(self, outgoing: Outgoing) -> bytes:
        body = dict(outgoing.body)
        body["stream"] = True
        usage: dict[str, bool] = {"include_usage": True}
        limit = "max_tokens"
        if self.options.vendor_fields:
            usage["continuous_usage_stats"] = True
            body["return_token_ids"] = True
        else:
            body.pop("ignore_eos", None)
            if outgoing.endpoint == "chat":
                limit = "max_completion_tokens"
        body["stream_options"] = usage
        body[limit] = outgoing.max_tokens
        return msgspec.json.encode(body)

    def prepare(self, outgoing: Outgoing) -> Answer:
        """Makes all that can be made before a request's time."""
        path = ENDPOINTS[outgoing.endpoint]
        request = self.pool.encode("POST", path, self._body(outgoing))
        return Answer(outgoing, request, self._sink(outgoing))

    def _sink(self, outgoing: Outgoing) -> StreamSink:
        return StreamSink(
            keep_output=outgoing.keep_output or outgoing.expected is not None,
            cancel_after=outgoing.cancel_after,
            counter=self.counter,
        )

    def turn_to(self, answer: Answer, intended: float) -> None:
        """Its time has come; `intended` is when that should have been, on the run's clock."""
        answer.intended, answer.origin = intended, self.origin
        answer.dispatched = self.now()

    def launch(self, answer: Answer) -> None:
        """Writes the request if a connection is open; else `follow` will."""
        # a slow reader shrinks its socket's buffers, so it shares no connection
        if answer.outgoing.read_rate is None and (connection := self.pool.take()) is not None:
            answer.reused = True
            self._begin(answer, connection)

    def _begin(self, answer: Answer, connection: Connection) -> None:
        assert answer.sink is not None

        def ended(stamp: float) -> None:
            self.pool.release(connection)
            answer.complete(stamp)

        answer.connection = connection
        answer.exchange = connection.begin(
            answer.request, answer.sink, answer.outgoing.read_rate, ended
        )
        answer.sent = answer.exchange.sent

    async def follow(self, answer: Answer) -> None:
        """Reads to the end, whatever the end is."""
        try:
            async with asyncio.timeout(self.options.timeout):
                await self._attempts(answer)
        except TimeoutError:
            answer.outcome = "timeout"
            answer.message = f"not finished within {self.options.timeout:g} s"
        except asyncio.CancelledError:
            answer.outcome = "unfinished"
            answer.message = "the run ended first"
        answer.close(self.now())

    async def send(self, outgoing: Outgoing, intended: float) -> Answer:
        """All of it at once."""
        answer = self.prepare(outgoing)
        self.turn_to(answer, intended)
        await self.follow(answer)
        return answer

    async def _attempts(self, answer: Answer) -> None:
        for number in range(self.options.retries + 1):
            if number:
                answer.again(self._sink(answer.outgoing))
            await self._attempt(answer)
            refused = answer.outcome == "refused"
            overloaded = answer.outcome == "http_error" and answer.status in _RETRIED
            if number == self.options.retries or not (refused or overloaded):
                return
            await asyncio.sleep(self._pause(answer, number))

    def _pause(self, answer: Answer, number: int) -> float:
        asked = answer.sink.headers.get("retry-after", "") if answer.sink else ""
        if self.options.honour_retry_after and asked.replace(".", "", 1).isdigit():
            return float(asked)
        return min(0.1 * 2**number, 5.0)

    async def _attempt(self, answer: Answer) -> None:
        sink = answer.sink
        assert sink is not None
        try:
            if answer.exchange is None:
                fresh = answer.outgoing.read_rate is not None
                connection, answer.reused = await self.pool.acquire(fresh=fresh)
                self._begin(answer, connection)
            assert answer.connection is not None
            assert answer.exchange is not None
            await answer.connection.finish(answer.exchange)
        except ConnectError as error:
            answer.outcome = "refused" if error.refused else "connect_error"
            answer.message = str(error)
            answer.sink = None
        except ConnectionLostError as error:
            if sink.done is not None:
                answer.judge()
            else:
                answer.outcome = "truncated" if sink.first_byte is not None else "reset"
                answer.message = str(error)
        except EnoughTokens:
            answer.outcome = "cancelled"
        except (MalformedError, ProtocolError) as error:
            answer.outcome, answer.message = "malformed", str(error)


class Answer:
    """A request with what became of it. Making its record is left for later: a user who waits for
    this answer to ask again must not wait for the book-keeping too."""

    def __init__(self, outgoing: Outgoing, request: bytes, sink: StreamSink) -> None:
        self.outgoing = outgoing
        self.request = request
        """The bytes to send."""
        self.number = 1
        """Attempts."""
        self.outcome: Outcome = "ok"
        self.message: str | None = None
        self.intended = 0.0
        self.dispatched: float | None = None
        """When the client turned to it; None if it has not."""
        self.sent: float | None = None
        self.reused = False
        self.sink: StreamSink | None = sink
        """Of the last attempt; None if nothing was ever sent."""
        self.connection: Connection | None = None
        self.exchange: Exchange | None = None
        self.end = 0.0
        """On the run's clock."""
        self.free = 0.0
        """When whoever waited for it may go on: `end`, or the last byte of an answer that is
        complete, which comes after its [DONE]."""
        self.on_end: Callable[[float], None] | None = None
        """Called with `free` as soon as an answer that was not refused is complete, before it is
        looked into."""
        self.origin = 0.0

    @property
    def status(self) -> int | None:
        return self.sink.status or None if self.sink is not None else None

    @property
    def failed(self) -> bool:
        return self.outcome not in HARMLESS

    def again(self, sink: StreamSink) -> None:
        """Another attempt."""
        self.number += 1
        self.outcome, self.message = "ok", None
        self.sink, self.connection, self.exchange = sink, None, None

    def complete(self, stamp: float) -> None:
        """The HTTP message is complete."""
        self.free = stamp - self.origin
        if self.on_end is not None and self.status == 200:
            self.on_end(self.free)
        self.judge()

    def judge(self) -> None:
        """Names the outcome of an answer whose HTTP message is complete."""
        sink = self.sink
        assert sink is not None
        self.outcome, self.message = _judge(sink, self.outgoing.max_tokens)

    def close(self, now: float) -> None:
        """Nothing more will come; the end is that of the last bytes, if they tell."""
        sink, self.end = self.sink, now
        if sink is None:
            self.free = now
            return
        if self.outcome == "ok" and sink.done is not None:
            self.end = sink.done - self.origin
        elif self.outcome != "timeout" and sink.last_stamp is not None:
            self.end = sink.last_stamp - self.origin
        self.free = max(self.free, self.end)

    def record(self) -> RequestRecord:
        """All that is remembered of it."""
        out, sink, origin = self.outgoing, self.sink, self.origin
        record = RequestRecord(
            index=out.index,
            turn=out.turn,
            traffic=out.traffic,
            kind="load" if out.expected is None else "canary",
            intended=self.intended,
            dispatched=self.intended if self.dispatched is None else self.dispatched,
            sent=self.sent - origin if self.sent is not None else None,
            end=self.end,
            outcome=self.outcome,
            message=self.message[:200] if self.message else None,
            status=self.status,
            attempts=self.number,
            reused=self.reused,
            slow_reader=out.read_rate is not None,
            max_tokens=out.max_tokens,
        )
        if sink is None:
            return record
        stamps = [stamp - origin for stamp in sink.chunk_stamps]
        if sink.first_byte is not None:
            record.first_byte = sink.first_byte - origin
            record.last_byte = self.free
        if stamps:
            record.first_token, record.last_token = stamps[0], stamps[-1]
        record.finish_reason = sink.finish_reason
        record.output_tokens, record.basis = sink.output_tokens, sink.basis
        record.chunk_us = pack_offsets([stamp - self.intended for stamp in stamps])
        record.chunk_tokens = pack_counts(sink.chunk_counts)
        record.early_stop = (
            record.completed
            and bool(out.body.get("ignore_eos"))
            and sink.finish_reason == "stop"
            and (record.output_tokens or 0) < out.max_tokens
        )
        if sink.usage is not None:
            record.prompt_tokens = sink.usage.prompt_tokens
            if sink.usage.prompt_tokens_details is not None:
                record.cached_tokens = sink.usage.prompt_tokens_details.cached_tokens
        if sink.metrics is not None:
            if sink.metrics.queue_time_ms is not None:
                record.server_queue = sink.metrics.queue_time_ms / 1e3
            if sink.metrics.time_to_first_token_ms is not None:
                record.server_ttft = sink.metrics.time_to_first_token_ms / 1e3
        if out.expected is not None and record.completed:
            record.canary_match = "".join(sink.text) == out.expected
        return record


def _judge(sink: StreamSink, max_tokens: int) -> tuple[Outcome, str | None]:
    if sink.status != 200:
        return "http_error", f"HTTP {sink.status}: {sink.http_error}"
    if sink.answered_otherwise:
        return "malformed", f"200 without an event stream: {sink.http_error}"
    if sink.error is not None:
        return "error_event", sink.error
    if sink.done is None:
        return "truncated", "the stream ended without [DONE]"
    if sink.finish_reason is None:
        return "truncated", "[DONE] without a finish_reason"
    if sink.finish_reason in ("abort", "error"):
        return "error_event", f"finish_reason {sink.finish_reason}"
    if not sink.chunk_counts:
        return "empty_output", "no token came"
    tokens = sink.output_tokens
    if sink.finish_reason == "length" and tokens is not None and tokens < max_tokens:
        return "short_output", f"{tokens} of {max_tokens} tokens, yet finish_reason length"
    return "ok", None
