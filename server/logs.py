"""Log lines on stderr: for people, or one JSON object a line.

Knows nothing of what is logged. Messages are kept on one line, whatever is in them.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import msgspec

LogFormat = Literal["console", "json"]


def configure_logging(log_format: LogFormat, *, access: bool) -> None:
    """Sends this process's log to stderr; `access` keeps the line per request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Console())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("convserve.access").disabled = not access
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _Console(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        facts: dict[str, object] = getattr(record, "facts", {})
        words = [when, record.levelname, _one_line(record.getMessage())]
        line = " ".join([*words, *(f"{name}={value}" for name, value in facts.items())])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
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


def _one_line(text: str) -> str:
    return text.replace("\r", "\\r").replace("\n", "\\n")
