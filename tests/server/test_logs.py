"""Log lines: one line each, whatever is in them.

Breaks for: whoever reads or parses the log, and could be lied to by a client's text.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
from convserve.server.logs import LogFormat, configure_logging

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Puts the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield
    root.handlers, root.level = handlers, level
    logging.getLogger("convserve.access").disabled = False
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)


def logged(capsys: pytest.CaptureFixture[str], log_format: LogFormat, access: bool = True) -> str:
    configure_logging(log_format, access=access)
    facts = {"id": "abc", "status": 200}
    logging.getLogger("convserve.access").info("a\r\nfaked line", extra={"facts": facts})
    return capsys.readouterr().err


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    line = logged(capsys, "console")
    assert line.endswith("INFO a\\r\\nfaked line id=abc status=200\n")
    assert line.count("\n") == 1


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    line = logged(capsys, "json")
    assert line.count("\n") == 1
    entry = json.loads(line)
    assert entry["message"] == "a\r\nfaked line"
    assert (entry["level"], entry["id"], entry["status"]) == ("INFO", "abc", 200)


def test_without_access_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, "console", access=False) == ""
