"""A running server, as the tests of its clients see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Served(NamedTuple):
    """A server and what it serves."""

    url: str
    model: str
    folder: Path
