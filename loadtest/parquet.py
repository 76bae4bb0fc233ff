"""Requests as a Parquet table: the rows of the JSONL, for tools that read columns.

Needs pyarrow, which only this module imports. Knows records; measures nothing.
"""

from __future__ import annotations

import types
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from .records import RequestRecord, jsonl_row

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


def check_parquet() -> None:
    """Raises ValueError where the tables could not be written."""
    if find_spec("pyarrow") is None:
        raise ValueError("parquet: needs pyarrow (pip install 'convserve[parquet]')")


def write_parquet(records: Iterable[RequestRecord], path: Path) -> None:
    """One row a request; `chunk_times` (s from intended) and `chunk_tokens` are lists."""
    import pyarrow
    import pyarrow.parquet

    simple = {int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    fields = [
        (name, simple.get(_plain(hint), pyarrow.string()))
        for name, hint in get_type_hints(RequestRecord).items()
        if not name.startswith("chunk_")
    ]
    fields += [
        ("chunk_times", pyarrow.list_(pyarrow.float64())),
        ("chunk_tokens", pyarrow.list_(pyarrow.int32())),
    ]
    rows = [jsonl_row(record) for record in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(fields)), path)


def _plain(hint: Any) -> Any:
    """The type beside None."""
    if isinstance(hint, types.UnionType):
        return next(one for one in get_args(hint) if one is not type(None))
    return hint
