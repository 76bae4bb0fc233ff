"""Log lines on stderr: for people, or one JSON object a line.

Knows nothing of what is logged. Messages are kept on one line, whatever is in them.
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import Literal

import msgspec

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What could begin a line, or drive a terminal."""


def configure_logging(log_format: LogFormat, *, access: bool, level: LogLevel = "info") -> None:
    """Sends this process's log to stderr; `access` keeps the line per request.

    At level `debug` the requests of probes and of the page are there as well.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Console())
    others = "info" if level == "debug" else level
    logging.basicConfig(level=others.upper(), handlers=[handler], force=True)
    logging.getLogger("convserve").setLevel(level.upper())
    logging.getLogger("convserve.access").disabled = not access
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Console(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        facts: dict[str, object] = getattr(record, "facts", {})
        words = [when, record.levelname, record.getMessage()]
        line = _plain(" ".join([*words, *(f"{name}={value}" for name, value in facts.items())]))
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            line = "\n".join([line, *map(_plain, trace)])
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= getattr(record, "facts", {})
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)
        return msgspec.json.encode(fields).decode()


def _plain(text: str) -> str:
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
