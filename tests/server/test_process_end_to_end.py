"""The command itself: a real server process, its real engine process, and OpenAI's own client.

Breaks for: everybody. Nothing here is scripted but the weights, which are tiny and random.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from asgi_call import events
from golden import GOLDEN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOLDER = GOLDEN / "models" / "dynconv_lowrank_qkv"
KEY = "end-to-end"
PROMPT = "In the beginning there was a page of sixteen tokens, and then another."
LONG: dict[str, Any] = {
    "prompt": "a", "max_tokens": 490, "temperature": 0, "ignore_eos": True, "stream": True,
}  # fmt: skip


class Server:
    """A running `convserve serve`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        words = ("serve", str(FOLDER), "--port", "0", "--threads", "1", "--memory", "64MiB")
        env = {**os.environ, "CONVSERVE_API_KEY": KEY}
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "convserve.server", *words], stderr=stderr, env=env
            )
        deadline = time.monotonic() + 60
        while (found := re.search(r"http://127\S+", self.log())) is None:
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self.url = found[0]
        self.http = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=30
        )

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def engine_pid(self) -> int:
        """The process that the server started."""
        mine = str(self.process.pid)
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
        )
        pairs = [line.split() for line in listed.stdout.splitlines()]
        [pid] = [int(pid) for pid, parent in pairs if parent == mine]
        return pid

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with contextlib.closing(Server(tmp_path / "log")) as running:
        yield running


class Reader(threading.Thread):
    """Reads a stream to its end."""

    def __init__(self, server: Server) -> None:
        super().__init__(daemon=True)
        self._server = server
        self.has_begun = threading.Event()
        self.received = b""
        self.start()
        assert self.has_begun.wait(30), "the stream never began"

    def run(self) -> None:
        with self._server.http.stream("POST", "/v1/completions", json=LONG) as reply:
            for piece in reply.iter_raw():
                self.received += piece
                self.has_begun.set()

    def events(self) -> list[Any]:
        self.join(30)
        assert not self.is_alive(), "the stream never ended"
        return events(self.received)


def test_openai_client_then_a_drain(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        [model] = client.models.list().data
        ask: dict[str, Any] = {"model": model.id, "max_tokens": 24, "temperature": 0}
        whole = client.completions.create(prompt=PROMPT, **ask)
        stream = client.completions.create(prompt=PROMPT, stream=True, **ask)
        text = "".join(chunk.choices[0].text for chunk in stream)
        assert text == whole.choices[0].text
        assert text
        again = client.completions.create(prompt=PROMPT, **ask)
        assert again.choices[0].text == text
        assert again.usage is not None
        assert again.usage.prompt_tokens_details is not None
        assert again.usage.prompt_tokens_details.cached_tokens
        salted = client.completions.create(prompt=PROMPT, extra_body={"cache_salt": "x"}, **ask)
        assert salted.choices[0].text == text
        assert salted.usage is not None
        assert salted.usage.prompt_tokens_details is not None
        assert salted.usage.prompt_tokens_details.cached_tokens == 0
        messages: Any = [{"role": "user", "content": "Hi"}]
        answer = client.chat.completions.create(messages=messages, **ask)
        deltas = client.chat.completions.create(messages=messages, stream=True, **ask)
        told = "".join(chunk.choices[0].delta.content or "" for chunk in deltas)
        assert told == answer.choices[0].message.content
        asked = {"structured_outputs": {"choice": ["yes", "no"]}}
        held = client.completions.create(prompt="a", extra_body=asked, **ask)
        assert held.choices[0].text in ("yes", "no")
        assert held.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="structured_outputs"):
            client.completions.create(
                prompt="a", extra_body={"structured_outputs": {"regex": "(a"}}, **ask
            )
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.completions.create(**{**ask, "prompt": "a", "temperature": -1})

    reader = Reader(server)
    server.process.send_signal(signal.SIGTERM)
    *chunks, done = reader.events()
    assert (chunks[-1]["choices"][0]["finish_reason"], done) == ("length", "[DONE]")
    assert server.process.wait(20) == 0


def test_a_killed_engine(server: Server) -> None:
    readers = [Reader(server) for _ in range(3)]
    os.kill(server.engine_pid(), signal.SIGKILL)
    # not ready within a second: told so, or gone
    deadline = time.monotonic() + 1
    with contextlib.suppress(httpx.TransportError):
        while server.http.get("/ready").status_code == 200:
            assert time.monotonic() < deadline
    for reader in readers:
        *_, error, done = reader.events()
        assert (error["error"]["code"], done) == (503, "[DONE]")
    assert server.process.wait(20) == 3
    assert "the engine died" in server.log()
