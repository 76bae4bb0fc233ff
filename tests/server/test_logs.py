"""Log lines: one line each, whatever is in them.

Breaks for: whoever reads or parses the log, and could be lied to by a client's text.
"""

from __future__ import annotations

import json
import logging

import pytest
from convserve.server.logs import LogFormat, LogLevel, configure_logging


def logged(capsys: pytest.CaptureFixture[str], log_format: LogFormat, access: bool = True) -> str:
    configure_logging(log_format, access=access)
    facts = {"id": "abc", "status": 200}
    logging.getLogger("convserve.access").info("a\r\nfaked line", extra={"facts": facts})
    return capsys.readouterr().err


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    line = logged(capsys, "console")
    assert line.endswith("INFO a\\r\\nfaked line id=abc status=200\n")
    assert line.count("\n") == 1


def test_nothing_in_a_line_begins_another_or_drives_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging("console", access=True)
    hostile = "a\x1b[2Jb\x9bc\u2028d\x00e"
    try:
        raise ValueError(hostile)
    except ValueError:
        logging.getLogger("convserve.server").exception(hostile, extra={"facts": {"x": hostile}})
    printed = capsys.readouterr().err
    assert all(character == "\n" or character.isprintable() for character in printed)
    assert printed.count("a\\x1b[2Jb\\x9bc\\u2028d\\x00e") == 3
    assert printed.splitlines()[0].count("\\x1b") == 2


@pytest.mark.parametrize(("level", "kept"), [("debug", 3), ("info", 2), ("warning", 1)])
def test_what_is_less_than_the_level_is_left_out(
    capsys: pytest.CaptureFixture[str], level: LogLevel, kept: int
) -> None:
    configure_logging("console", access=True, level=level)
    for say in (logging.DEBUG, logging.INFO, logging.WARNING):
        logging.getLogger("convserve.server").log(say, "said")
    logging.getLogger("elsewhere").debug("noise of others")
    assert capsys.readouterr().err.count("\n") == kept


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    line = logged(capsys, "json")
    assert line.count("\n") == 1
    entry = json.loads(line)
    assert entry["message"] == "a\r\nfaked line"
    assert (entry["level"], entry["id"], entry["status"]) == ("INFO", "abc", 200)


def test_without_access_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert logged(capsys, "console", access=False) == ""
