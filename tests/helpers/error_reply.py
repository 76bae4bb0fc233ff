"""What every refusal of the server looks like."""

from __future__ import annotations

from typing import Any


def error_of(reply: Any, status: int) -> dict[str, Any]:
    """The error of a reply, which has this status, one shape, and nothing it should not say."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert len(reply.content) < 1000
    assert "/secret" not in reply.text
    assert "Traceback" not in reply.text
    return body["error"]
