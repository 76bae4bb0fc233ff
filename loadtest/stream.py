"""Reads one streamed OpenAI answer: server-sent events into token arrivals.

Completions and chat completions alike. Counts tokens by their ids when the server sends them
(`return_token_ids`), by continuous usage otherwise, and keeps the stamp of the socket read that
brought each. Knows nothing of connections or schedules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from .records import TokenBasis

_MAX_ERROR_BYTES = 4096


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    def piece(self) -> str:
        if self.text is not None:
            return self.text
        if self.delta is None:
            return ""
        d = self.delta
        return d.content or d.reasoning or d.reasoning_content or ""

    def has_output(self) -> bool:
        return bool(self.piece()) or bool(self.delta and self.delta.tool_calls)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None


class _Metrics(msgspec.Struct):
    queue_time_ms: float | None = None
    time_to_first_token_ms: float | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class EnoughTokens(Exception):  # noqa: N818
    """The planned number of tokens has come: the client walks away."""


class MalformedError(Exception):
    """An event that is not the JSON of a chunk."""


class TokenCounter:
    """Tokens received so far by all streams of a client."""

    def __init__(self) -> None:
        self.tokens = 0


class StreamSink:
    """Collects one answer; feed it through `on_headers` and `on_body`."""

    def __init__(
        self,
        *,
        keep_output: bool = False,
        cancel_after: int | None = None,
        counter: TokenCounter | None = None,
    ) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.first_byte: float | None = None
        self.chunk_stamps: list[float] = []
        self.chunk_counts: list[int] = []
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.done: float | None = None
        self.last_stamp: float | None = None
        self.error: str | None = None
        self.usage: _Usage | None = None
        self.metrics: _Metrics | None = None
        self.saw_ids = False
        self.saw_running_usage = False
        self.tokens = 0
        """Tokens so far by the best count at hand; chunks when there is no count."""
        self._counter = counter
        self._cancel_after = cancel_after
        self._keep = keep_output
        self._line = b""
        self._data: list[bytes] = []
        self._error_body = bytearray()
        self._is_stream = False

    def on_headers(self, stamp: float, status: int, headers: dict[str, str]) -> None:
        self.first_byte = stamp
        self.status, self.headers = status, headers
        self._is_stream = status == 200 and "event-stream" in headers.get("content-type", "")

    def on_body(self, stamp: float, data: bytes) -> None:
        self.last_stamp = stamp
        if not self._is_stream:
            room = _MAX_ERROR_BYTES - len(self._error_body)
            self._error_body += data[: max(room, 0)]
            return
        lines = (self._line + data).split(b"\n")
        self._line = lines.pop()
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                self._data = []
                self._on_event(stamp, payload)

    def _on_event(self, stamp: float, payload: bytes) -> None:
        if payload == b"[DONE]":
            self.done = stamp
            return
        try:
            chunk = _decode_chunk(payload)
        except msgspec.DecodeError as error:
            raise MalformedError(f"{error}: {payload[:120]!r}") from error
        if chunk.error is not None:
            self.error = self.error or _error_text(chunk.error)
            return
        if chunk.metrics is not None:
            self.metrics = chunk.metrics
        counted = self.usage.completion_tokens or 0 if self.usage is not None else 0
        if chunk.usage is not None:
            self.usage = chunk.usage
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if choice.finish_reason is not None:
            self.finish_reason = choice.finish_reason
        if self._keep:
            self.text.append(choice.piece())
            self.token_ids += choice.token_ids or []
        if choice.token_ids is not None:
            self.saw_ids = True
            new = len(choice.token_ids)
        elif self._usage_is_running(chunk):
            self.saw_running_usage = True
            new = (chunk.usage.completion_tokens or 0) - counted if chunk.usage else 0
        else:
            new = 1 if choice.has_output() and not self.saw_ids else 0
        if new > 0:
            self.tokens += new
            if self._counter is not None:
                self._counter.tokens += new
            self.chunk_stamps.append(stamp)
            self.chunk_counts.append(new)
            if self._cancel_after is not None and self.tokens >= self._cancel_after:
                raise EnoughTokens

    def _usage_is_running(self, chunk: _Chunk) -> bool:
        # usage that first comes with a late chunk is the final total, not a running count
        return (
            chunk.usage is not None
            and not self.saw_ids
            and (self.saw_running_usage or not self.chunk_stamps)
        )

    @property
    def output_tokens(self) -> int | None:
        """Tokens generated, as the server counts them; None if it doesn't say."""
        if self.usage is not None and self.usage.completion_tokens is not None:
            return self.usage.completion_tokens
        return self.tokens if self.saw_ids else None

    @property
    def basis(self) -> TokenBasis:
        if self.saw_ids:
            return "ids"
        if self.saw_running_usage:
            return "usage"
        total = self.output_tokens
        # an end-of-text token is counted by some servers although it carries no text
        silent_end = 1 if self.finish_reason == "stop" else 0
        if total is not None and 0 <= total - len(self.chunk_counts) <= silent_end:
            return "count"
        return "unknown"

    @property
    def http_error(self) -> str:
        """What the server said instead of streaming."""
        body = bytes(self._error_body)
        try:
            return _error_text(msgspec.json.decode(body))
        except msgspec.DecodeError:
            return body.decode("utf-8", "replace")[:200]

    @property
    def answered_otherwise(self) -> bool:
        """A 200 that is not an event stream."""
        return self.status == 200 and not self._is_stream


def _error_text(error: object) -> str:
    while isinstance(error, dict):
        error = error.get("error") or error.get("message") or error.get("detail") or str(error)
    return str(error)[:200]
