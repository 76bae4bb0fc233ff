"""What is remembered of one request, and what kind of end it had.

Times are seconds on the run's clock (0 is the start of the measured load; one monotonic clock is
shared by all worker processes of a host). Knows nothing of HTTP or statistics.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable

Outcome = Literal[
    "ok",
    "cancelled",
    "refused",
    "connect_error",
    "reset",
    "http_error",
    "error_event",
    "truncated",
    "malformed",
    "empty_output",
    "short_output",
    "timeout",
    "unfinished",
]
"""How a request ended. `cancelled` was planned by the workload; all after it are failures."""

HARMLESS: tuple[Outcome, ...] = ("ok", "cancelled")

FAILURES: tuple[Outcome, ...] = (
    "refused",
    "connect_error",
    "reset",
    "http_error",
    "error_event",
    "truncated",
    "malformed",
    "empty_output",
    "short_output",
    "timeout",
    "unfinished",
)

TokenBasis = Literal["ids", "usage", "count", "unknown"]
"""How the tokens of each chunk were counted: by their ids, by continuous usage, by one token a
chunk confirmed by the final usage, or not at all (inter-token latency is refused)."""


class RequestRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request, from the moment it should have been sent to its last byte."""

    index: int
    """Session number; with `turn` it names the request in any run of the same seed."""
    turn: int = 0
    traffic: str = "default"
    """The traffic class it belongs to."""
    kind: Literal["load", "canary"] = "load"
    intended: float
    """When the schedule (or, in a closed loop, the free user) wanted it sent."""
    dispatched: float
    """When the client turned to it; later than `intended` only if the client was late."""
    sent: float | None = None
    """When its bytes went to the socket (of the last attempt)."""
    first_byte: float | None = None
    """When the answer's headers arrived."""
    first_token: float | None = None
    last_token: float | None = None
    end: float
    last_byte: float | None = None
    """When the HTTP message was complete, a little after what ended the answer: from then on its
    user may ask again."""
    outcome: Outcome = "ok"
    status: int | None = None
    message: str | None = None
    """Why it failed, shortened."""
    finish_reason: str | None = None
    attempts: int = 1
    reused: bool = False
    """Sent on a connection that was already open."""
    slow_reader: bool = False
    """The workload read it slowly on purpose: its latencies are not the server's."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    max_tokens: int = 0
    output_tokens: int | None = None
    """From the server's usage or token ids; never from counted chunks alone."""
    basis: TokenBasis = "unknown"
    early_stop: bool = False
    """Finished by `stop` although the end-of-text token was to be ignored."""
    server_queue: float | None = None
    """Seconds in the server's queue, if the answer says so."""
    server_ttft: float | None = None
    """The server's own time to first token, if the answer says so."""
    canary_match: bool | None = None
    chunk_us: bytes = b""
    """Arrival of each chunk that carried tokens: uint32 microseconds since `intended`."""
    chunk_tokens: bytes = b""
    """Tokens in each of those chunks: uint16; meaningless when basis is `unknown`."""

    def chunk_offsets(self) -> array[int]:
        """Microseconds from `intended` to each chunk that carried tokens."""
        return array("I", self.chunk_us)

    def chunk_counts(self) -> array[int]:
        """Tokens of each chunk in `chunk_offsets`."""
        return array("H", self.chunk_tokens)

    @property
    def completed(self) -> bool:
        """The answer came whole, so end-to-end figures exist."""
        return self.outcome == "ok"

    @property
    def failed(self) -> bool:
        return self.outcome not in HARMLESS


def in_order(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """By intended time, then by session."""
    return sorted(records, key=lambda record: (record.intended, record.index, record.turn))


def jsonl_row(record: RequestRecord) -> dict[str, Any]:
    """Every field under its name, the arrivals unpacked: `chunk_times` in s from `intended`."""
    row = {name: getattr(record, name) for name in RequestRecord.__struct_fields__}
    row["chunk_times"] = [offset / 1e6 for offset in record.chunk_offsets()]
    row["chunk_tokens"] = list(record.chunk_counts())
    del row["chunk_us"]
    return row


def pack_offsets(seconds: list[float]) -> bytes:
    """Packs offsets of up to 71 minutes; later ones saturate."""
    return array("I", [min(max(round(s * 1e6), 0), 0xFFFFFFFF) for s in seconds]).tobytes()


def pack_counts(counts: list[int]) -> bytes:
    return array("H", [min(max(c, 0), 0xFFFF) for c in counts]).tobytes()


class AuditSample(msgspec.Struct, kw_only=True):
    """What one worker process noticed about itself while it made load."""

    loop_lag: list[float] = []
    """Lateness of a periodic timer, seconds, oldest first."""
    cpu_seconds: float = 0.0
    """Process CPU time during the measured load, without deliberate waiting."""
    wall_seconds: float = 0.0
    parse_seconds: float = 0.0
    """Time spent on decoding answers."""
    spin_seconds: float = 0.0
    """Time spent on waiting actively for a send time; harmless."""
