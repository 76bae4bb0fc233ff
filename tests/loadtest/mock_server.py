"""An OpenAI-like server whose delays, stalls and failures are programmed, and which keeps a log.

Run as a process (`python mock_server.py`, prints its port): a server inside the test's process
would share the interpreter lock with the client it is to judge. `POST /program` sets the
behaviour and empties the log, `GET /log` says when each request arrived and each chunk was
written, on the same monotonic clock that the client uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from time import perf_counter
from typing import Any, cast

import httptools
import msgspec


class Program(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the server does until the next program."""

    ttft: tuple[float, ...] = (0.02,)
    """Seconds to the first token; request i takes entry i, around and around."""
    itl: tuple[float, ...] = (0.01,)
    """Seconds between chunks, cycled within each request."""
    per_chunk: tuple[int, ...] = (1,)
    """Tokens of each chunk, cycled within each request."""
    stall: tuple[float, float] = (0.0, 0.0)
    """(first second, last second) after the first request in which nothing is written."""
    slots: int = 1_000_000
    """Requests served at a time; others queue in order."""
    fail_every: int = 0
    """Every this many requests (by arrival) fails as `fail` says."""
    fail: str = ""
    """status:CODE, drop:TOKENS, error:TOKENS, no_done, no_finish, malformed, short, empty."""
    retry_after: str = ""
    ids: bool = True
    running_usage: bool = True
    final_usage: bool = True
    reject_vendor_fields: bool = False
    corrupt_from: int = 1_000_000_000
    """Answers from this request on differ from what the prompt determines."""
    precise: bool = True
    """Wait actively for the last millisecond."""


class State:
    def __init__(self) -> None:
        self.reset(Program())

    def reset(self, program: Program) -> None:
        self.program = program
        self.log: list[dict[str, Any]] = []
        self.first: float | None = None
        self.slots = asyncio.Semaphore(program.slots)
        self.running = 0
        self.waiting = 0


async def sleep_until(moment: float, precise: bool) -> None:
    margin = 0.0012 if precise else 0.0
    wait = moment - perf_counter()
    if wait > margin:
        await asyncio.sleep(wait - margin)
    while precise and perf_counter() < moment:
        await asyncio.sleep(0)


class Server(asyncio.Protocol):
    def __init__(self, state: State) -> None:
        self.state = state
        self.task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.fresh()

    def fresh(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.body = b""

    def data_received(self, data: bytes) -> None:
        self.stamp = perf_counter()
        self.parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.task = asyncio.create_task(self.answer(self.url.decode(), self.body))
        self.parser = httptools.HttpRequestParser(self)
        self.url = self.body = b""

    def connection_lost(self, exc: Exception | None) -> None:
        if self.task is not None:
            self.task.cancel()

    def plain(self, status: int, body: bytes, headers: str = "") -> None:
        self.transport.write(
            f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: application/json\r\n{headers}\r\n".encode()
            + body
        )

    async def answer(self, url: str, raw: bytes) -> None:
        state = self.state
        body = msgspec.json.decode(raw) if raw else {}
        if url == "/program":
            state.reset(msgspec.json.decode(raw, type=Program))
            self.plain(200, b"{}")
        elif url == "/log":
            self.plain(200, msgspec.json.encode(state.log))
        elif url == "/health":
            self.plain(200, b"{}")
        elif url == "/v1/models":
            self.plain(200, b'{"object":"list","data":[{"id":"mock","max_model_len":4096}]}')
        elif url == "/version":
            self.plain(200, b'{"version":"mock-1"}')
        elif url == "/tokenize":
            words = str(body["prompt"]).split()
            ids = [1000 + sum(word.encode()) % 997 for word in words]
            self.plain(200, msgspec.json.encode({"tokens": ids, "count": len(ids)}))
        elif url == "/metrics":
            self.plain(
                200,
                f'# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{{a="b"}} '
                f"{state.running}\nvllm:num_requests_waiting {state.waiting}\n".encode(),
            )
        elif url in ("/v1/completions", "/v1/chat/completions"):
            await self.generate(body, chat="chat" in url)
        else:
            self.plain(404, b'{"error":{"message":"no such route"}}')

    async def generate(self, body: dict[str, Any], chat: bool) -> None:
        state, program = self.state, self.state.program
        if program.reject_vendor_fields and "return_token_ids" in body:
            self.plain(400, b'{"error":{"message":"unknown field return_token_ids"}}')
            return
        prompt = body["messages"] if chat else body["prompt"]
        if not chat and isinstance(prompt, list):
            prompt_tokens = len(prompt)
        else:
            text = " ".join(m["content"] for m in prompt) if chat else prompt
            prompt_tokens = round(1.25 * len(text.split())) + (7 if chat else 1)
        number = len(state.log)
        entry: dict[str, Any] = {
            "arrived": self.stamp,
            "chunks": [],
            "counts": [],
            "prompt": prompt,
            "cancelled": False,
            "body": {k: v for k, v in body.items() if k not in ("prompt", "messages")},
        }
        if not body.get("stream"):
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": 1}
            self.plain(200, msgspec.json.encode({"choices": [{"text": "x"}], "usage": usage}))
            return
        state.log.append(entry)
        if state.first is None:
            state.first = self.stamp
        failing = program.fail_every > 0 and (number + 1) % program.fail_every == 0
        fail, _, detail = (program.fail if failing else "").partition(":")
        if fail == "status":
            after = f"Retry-After: {program.retry_after}\r\n" if program.retry_after else ""
            self.plain(int(detail), b'{"error":{"message":"programmed"}}', after)
            return
        if fail == "reset":
            self.transport.abort()
            return
        arrived = self.stamp
        try:
            state.waiting += 1
            try:
                await state.slots.acquire()
            finally:
                state.waiting -= 1
            state.running += 1
            try:
                begin = max(arrived, perf_counter() if program.slots < 1_000_000 else arrived)
                await self.stream(body, chat, number, entry, begin, prompt_tokens, fail, detail)
            finally:
                state.running -= 1
                state.slots.release()
        except asyncio.CancelledError:
            entry["cancelled"] = True
            raise

    async def stream(
        self,
        body: dict[str, Any],
        chat: bool,
        number: int,
        entry: dict[str, Any],
        begin: float,
        prompt_tokens: int,
        fail: str,
        detail: str,
    ) -> None:
        state, program = self.state, self.state.program
        total = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        if fail == "short":
            total = max(total // 2, 1)
        if fail == "empty":
            total = 0
        usage_running = program.running_usage and body["stream_options"].get(
            "continuous_usage_stats"
        )
        ids = program.ids and body.get("return_token_ids")
        done = 0

        def usage() -> dict[str, int]:
            return {"prompt_tokens": prompt_tokens, "completion_tokens": done}

        def event(data: dict[str, Any]) -> bytes:
            line = b"data: " + msgspec.json.encode(data) + b"\n\n"
            return b"%x\r\n%b\r\n" % (len(line), line)

        due = begin + program.ttft[number % len(program.ttft)]
        index = 0
        head = (
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        if chat:
            role: dict[str, Any] = {
                "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]
            }
            if usage_running:
                role["usage"] = usage()
            head += event(role)
        while True:
            # the bytes are made before their time, so that the stamp is that of their write
            count = min(program.per_chunk[index % len(program.per_chunk)], total - done)
            breaks = fail in ("drop", "error") and done >= int(detail)
            data = b""
            if count and not breaks:
                corrupt = "!" if number >= program.corrupt_from else ""
                text = "".join(f"t{done + k}{corrupt} " for k in range(count))
                choice: dict[str, Any] = {"index": 0}
                choice.update({"delta": {"content": text}} if chat else {"text": text})
                if ids:
                    choice["token_ids"] = [2000 + done + k for k in range(count)]
                done += count
                kind = "chat.completion.chunk" if chat else "text_completion"
                chunk: dict[str, Any] = {"id": "x", "object": kind, "choices": [choice]}
                if usage_running:
                    chunk["usage"] = usage()
                data = event(chunk)
            await sleep_until(due, program.precise)
            low, high = (
                (state.first or 0.0) + program.stall[0],
                (state.first or 0) + program.stall[1],
            )
            if low <= perf_counter() < high:
                await sleep_until(high, program.precise)
                due = perf_counter()
            stamp = perf_counter()
            self.transport.write(head + data)
            head = b""
            if breaks:
                if fail == "drop":
                    self.transport.abort()
                    return
                self.transport.write(event({"error": {"message": "programmed", "code": 500}}))
                break
            if not count:
                break
            entry["chunks"].append(stamp)
            entry["counts"].append(count)
            if fail == "malformed":
                self.transport.write(b"7\r\ndata: {\r\n2\r\n\n\n\r\n")
                break
            if done >= total:
                break
            due += program.itl[index % len(program.itl)]
            index += 1
        if fail not in ("error", "no_finish", "malformed"):
            last: dict[str, Any] = {"index": 0, "finish_reason": "length"}
            last.update({"delta": {}} if chat else {"text": ""})
            self.transport.write(
                event({"choices": [last], **({"usage": usage()} if usage_running else {})})
            )
            if program.final_usage:
                self.transport.write(event({"choices": [], "usage": usage()}))
        entry["end"] = perf_counter()
        if fail != "no_done":
            self.transport.write(b"e\r\ndata: [DONE]\n\n\r\n")
        self.transport.write(b"0\r\n\r\n")


async def main() -> None:
    state = State()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Server(state), "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    # ends with the process that started it
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        import uvloop

        uvloop.run(main())
