"""Everything that a run leaves behind, under one prefix. Knows the formats' writers; no format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .html import write_html
from .parquet import write_parquet
from .records import in_order
from .result import write_csv, write_json, write_jsonl

if TYPE_CHECKING:
    from pathlib import Path

    from .records import RequestRecord
    from .result import Result


def write_files(result: Result, records: list[RequestRecord], prefix: Path, parquet: bool) -> str:
    """Writes PREFIX.json, .csv, .html, and .jsonl or .parquet; returns the ending of the latter."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, prefix.with_name(f"{prefix.name}.json"))
    write, ending = (write_parquet, ".parquet") if parquet else (write_jsonl, ".jsonl")
    write(in_order(records), prefix.with_name(f"{prefix.name}{ending}"))
    write_csv(result, prefix.with_name(f"{prefix.name}.csv"))
    write_html(result, prefix.with_name(f"{prefix.name}.html"))
    return ending
