"""Reads published request traces: Mooncake (JSONL), Azure LLM inference and BurstGPT (CSV).

Traces carry arrival times and token counts, no text; Mooncake also names the 512-token blocks
that prompts share. Knows nothing of prompts or sending.
"""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MOONCAKE_BLOCK = 512


class TraceRow(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a trace; `time` is seconds since the trace's first request."""

    time: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the shared 512-token blocks the prompt consists of; empty if not told."""


class _Mooncake(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int | None = None) -> list[TraceRow]:
    """Reads a trace, telling the format from its content; rows are sorted by time.

    Rows without output (failed requests, in BurstGPT) are left out.

    Raises:
        ValueError: names the file, the line and what is wrong.
    """
    with path.open(newline="") as file:
        first = file.readline()
        file.seek(0)
        if first.lstrip().startswith("{"):
            rows = list(_mooncake(path, file))
        else:
            rows = list(_table(path, csv.DictReader(file)))
    rows = sorted((row for row in rows if row.output_tokens > 0), key=lambda row: row.time)
    if not rows:
        raise ValueError(f"{path}: no requests")
    begin = rows[0].time
    return [msgspec.structs.replace(row, time=row.time - begin) for row in rows[:limit]]


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[TraceRow]:
    decode = msgspec.json.Decoder(_Mooncake).decode
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: line {number}: {error}") from error
        yield TraceRow(
            time=row.timestamp / 1e3,
            prompt_tokens=row.input_length,
            output_tokens=row.output_length,
            blocks=row.hash_ids,
        )


_COLUMNS = {
    "Azure": ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    "BurstGPT": ("Timestamp", "Request tokens", "Response tokens"),
}


def _table(path: Path, reader: csv.DictReader[str]) -> Iterator[TraceRow]:
    names = reader.fieldnames or []
    for columns in _COLUMNS.values():
        if set(columns) <= set(names):
            break
    else:
        allowed = " or ".join(f"{kind} ({', '.join(c)})" for kind, c in _COLUMNS.items())
        raise ValueError(f"{path}: columns {', '.join(names)} are not those of {allowed}")
    time, prompt, output = columns
    for row in reader:
        try:
            yield TraceRow(
                time=_seconds(row[time]),
                prompt_tokens=int(float(row[prompt])),
                output_tokens=int(float(row[output])),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from error


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        # Azure stamps carry seven digits of a second, one more than datetime reads
        head, dot, fraction = text.strip().partition(".")
        digits = fraction[: len(fraction) - len(fraction.lstrip("0123456789"))]
        zone = fraction[len(digits) :]
        moment = datetime.fromisoformat(head + zone if dot else head)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return moment.timestamp() + (float(f"0.{digits}") if digits else 0.0)
