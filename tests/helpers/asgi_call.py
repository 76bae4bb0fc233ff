"""Calls an ASGI app message by message, as a server would: streams, disconnects, stuck readers.

(httpx's ASGITransport hands a reply over only when it is complete.)
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

WAIT = 10.0
"""Seconds after which a test that waits has failed."""


class AsgiCall:
    """One request in progress."""

    def __init__(
        self,
        app: ASGIApp,
        method: str,
        path: str,
        body: bytes | dict[str, Any] = b"",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Starts it. Without headers, a JSON body is declared."""
        self._messages: asyncio.Queue[Message] = asyncio.Queue()
        self._gone = asyncio.Event()
        self._body: bytes | None = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.stuck = asyncio.Event()
        self.stuck.set()
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.received = b""
        self.is_complete = False
        given = {"content-type": "application/json"} if headers is None else headers
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [(name.encode(), value.encode()) for name, value in given.items()],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self.stuck.wait()
        self._messages.put_nowait(message)

    def disconnect(self) -> None:
        """The client goes away."""
        self._gone.set()

    async def next(self) -> bytes:
        """The next piece of the reply's body (b"" for its start)."""
        message = await asyncio.wait_for(self._messages.get(), WAIT)
        if message["type"] == "http.response.start":
            assert self.status is None, "a second start"
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            return b""
        assert not self.is_complete, "bytes after the end"
        self.is_complete = not message.get("more_body", False)
        self.received += message.get("body", b"")
        return message.get("body", b"")

    async def until(self, part: bytes) -> bytes:
        """Reads until `part` has come; returns everything so far."""
        while part not in self.received:
            await self.next()
        return self.received

    async def finish(self) -> bytes:
        """Reads to the end and waits for the app to return."""
        while not self.is_complete:
            await self.next()
        await asyncio.wait_for(self.task, WAIT)
        return self.received

    @property
    def has_message(self) -> bool:
        """Whether something was sent that has not been read."""
        return not self._messages.empty()


def events(stream: bytes) -> list[Any]:
    """The events of a whole SSE stream: objects, then the string `[DONE]`; comments left out."""
    text = stream.decode()
    assert text.endswith("\n\n")
    found: list[Any] = []
    for block in text[:-2].split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: "), block
        assert "\n" not in block, block
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found
