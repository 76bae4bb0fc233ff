"""The mock server as a process, and its remote control.

Knows how to start, program and question it; knows nothing of loads.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = Path(__file__).parents[1] / "loadtest" / "mock_server.py"


class Mock:
    """A running mock server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def program(self, **fields: Any) -> None:
        """Sets its behaviour (see `mock_server.Program`) and empties its log."""
        request = Request(f"{self.url}/program", data=msgspec.json.encode(fields))
        with urlopen(request) as answer:
            assert answer.status == 200

    def log(self) -> list[dict[str, Any]]:
        """When each request arrived and each chunk was written, on this host's clock."""
        with urlopen(f"{self.url}/log") as answer:
            return msgspec.json.decode(answer.read())


@contextlib.contextmanager
def running_mock() -> Iterator[Mock]:
    """Starts one on a free port; it inherits this process's scheduling."""
    process = subprocess.Popen(
        [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield Mock(int(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()
