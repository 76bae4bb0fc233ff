"""What HTTP and text cost a token: the real server beside an engine that only counts.

    python bench/http_cost.py [--streams 64] [--rate 5000] [--tokens 400] [--endpoint chat]

Three processes on this machine: `convserve serve` as it is, joined by its own socket to a mock
engine that makes `rate` tokens per second in all and stamps each report, and this client, which
stamps bytes when it reads them. A token's text names the step that made it, so the time from the
engine's report to the client's socket is known for every token, and so is a token that is lost.

Two ways of making the same tokens: `spread`, one stream after another, and `steps`, all streams at
once, as a real engine does; there a token also waits for those of the other streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import queue
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import _import  # noqa: F401  (makes `convserve` importable)
import numpy as np
from convserve.engine import process as engine_process
from convserve.engine.config import EngineConfig
from convserve.engine.messages import (
    AbortRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Shutdown,
    StepReport,
    TokenEvent,
)
from convserve.engine.wire import command_decoder, frame, receive_frame
from convserve.loadtest.http import Pool, Target
from convserve.loadtest.worker import run_loop
from convserve.server import serve
from convserve.server.settings import ServerSettings
from make_model import tokenizer

FIRST, VOCAB = 256, 100_352
"""Ids of whole words: one a step, around and around."""


# The engine: a process of its own, started by the server.


def run_engine(path: str) -> None:
    """Makes tokens until told to stop; then writes the stamp of every report."""
    rate, streams = float(os.environ["BENCH_RATE"]), int(os.environ["BENCH_STREAMS"])
    spread = os.environ["BENCH_MODE"] == "spread"
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        assert receive_frame(sock) is not None
        sock.sendall(frame(_info(streams)))

        def read() -> None:
            while (body := receive_frame(sock)) is not None:
                inbox.put(command_decoder.decode(body))
            inbox.put(Shutdown())

        threading.Thread(target=read, daemon=True).start()
        stamps = _make_tokens(sock, inbox, streams / rate, streams if spread else 1)
    Path(os.environ["BENCH_STAMPS"]).write_text(json.dumps(stamps))


def _make_tokens(
    sock: socket.socket, inbox: queue.SimpleQueue[Any], period: float, parts: int
) -> list[float]:
    """Every `period`, one token for each request, in `parts` reports."""
    places: list[dict[str, list[int]]] = [{} for _ in range(parts)]
    stamps: list[float] = []
    due = time.perf_counter()
    while True:
        for place in places:
            due += period / parts
            while not inbox.empty():
                command = inbox.get()
                if isinstance(command, GenerateRequest):
                    emptiest = min(places, key=len)
                    emptiest[command.request_id] = [command.params.max_tokens or 0]
                elif isinstance(command, AbortRequest):
                    for one in places:
                        one.pop(command.request_id, None)
                elif isinstance(command, Shutdown):
                    return stamps
            time.sleep(max(due - time.perf_counter(), 0))
            if not place:
                continue
            token = FIRST + len(stamps) % (VOCAB - FIRST)
            events: list[TokenEvent] = []
            for request_id, left in list(place.items()):
                left[0] -= 1
                finish = None if left[0] else "length"
                events.append(TokenEvent(request_id, 0, (token,), finish_reason=finish))
                if not left[0]:
                    del place[request_id]
            report = StepReport(tuple(events), EngineStats(running=sum(map(len, places))))
            stamps.append(time.perf_counter())
            sock.sendall(frame(report))


def _info(streams: int) -> EngineInfo:
    return EngineInfo(
        model=os.environ["BENCH_FOLDER"],
        model_type="llama",
        vocab_size=VOCAB,
        max_model_len=4096,
        max_num_seqs=streams,
        page_size=16,
        num_pages=1 << 14,
        eos_token_ids=(VOCAB - 1,),
        device="none",
        dtype="none",
        kv_bytes_per_token=1,
        conv_bytes_per_sequence=1,
        page_pool_bytes=1,
        weight_bytes=1,
        replay_length=None,
        conv="none",
    )


# The server: the real one, but for the program that it starts as its engine.


def run_server() -> int:
    """`convserve serve` with the mock engine in the engine's place."""
    start = asyncio.create_subprocess_exec

    async def start_mock(_python: str, _m: str, _module: str, path: str, **options: Any) -> Any:
        return await start(sys.executable, __file__, "--as-engine", path, **options)

    engine_process.asyncio.create_subprocess_exec = start_mock  # pyright: ignore[reportAttributeAccessIssue]
    folder = os.environ["BENCH_FOLDER"]
    return serve.run(
        EngineConfig(model=folder), ServerSettings(model_names=("m",)), serve.ListenOptions(port=0)
    )


# The client.


class Stream:
    """Keeps what came and when; makes sense of it when the load is over."""

    def __init__(self) -> None:
        self.status = 0
        self.pieces: list[tuple[float, bytes]] = []

    def on_headers(self, stamp: float, status: int, headers: dict[str, str]) -> None:
        self.status = status

    def on_body(self, stamp: float, data: bytes) -> None:
        self.pieces.append((stamp, data))

    def tokens(self, ids: dict[str, int]) -> list[tuple[float, int]]:
        """(stamp, token id) of each token; raises if the stream was not whole."""
        found: list[tuple[float, int]] = []
        rest, done, finish = b"", False, None
        for stamp, data in self.pieces:
            *events, rest = (rest + data).split(b"\n\n")
            for event in events:
                payload = event.removeprefix(b"data: ")
                if payload == b"[DONE]":
                    done = True
                    continue
                choice = json.loads(payload)["choices"][0]
                text = choice.get("text") or choice.get("delta", {}).get("content")
                if text:
                    found += [(stamp, ids[word]) for word in text.split()]
                finish = choice["finish_reason"] or finish
        if self.status != 200 or not done or finish != "length":
            raise SystemExit(f"a stream ended wrongly: {self.status}, {finish}, [DONE] {done}")
        return found


async def load(url: str, args: argparse.Namespace) -> list[Stream]:
    """Every stream at once, each asking again when its answer is over."""
    pool = Pool(Target(url))
    body: dict[str, Any] = {"model": "m", "max_tokens": args.tokens, "stream": True}
    if args.endpoint == "chat":
        path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}
    else:
        path, asked = "/v1/completions", {"prompt": [300] * 128}
    request = pool.encode("POST", path, json.dumps({**body, **asked}).encode())
    streams: list[Stream] = []

    async def user(number: int) -> None:
        await asyncio.sleep(number * 0.002)
        for _ in range(args.repeats):
            stream = Stream()
            connection, _reused = await pool.acquire()
            await connection.exchange(request, stream)
            pool.release(connection)
            streams.append(stream)

    await asyncio.gather(*(user(number) for number in range(args.streams)))
    _, _, page = await pool.fetch("GET", "/metrics")
    pool.close()
    buckets = re.findall(r'event_loop_lag_seconds_bucket\{le="(.+?)".*?\} (\S+)', page.decode())
    total = float(buckets[-1][1])
    bound = next(float(edge) for edge, count in buckets if float(count) >= 0.99 * total)
    print(f"  event-loop lag of the server: p99 <= {bound * 1e3:g} ms ({total:.0f} looks)")
    return streams


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(mode: str, folder: Path, ids: dict[str, int], args: argparse.Namespace) -> None:
    """One load on a server of its own."""
    stamps = folder / "stamps.json"
    package = str(Path(sys.modules["convserve"].__path__[0]).parent)
    env = os.environ | {
        "BENCH_RATE": str(args.rate),
        "BENCH_STREAMS": str(args.streams),
        "BENCH_MODE": mode,
        "BENCH_FOLDER": str(folder),
        "BENCH_STAMPS": str(stamps),
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, __file__, "--as-server"]
    server = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            if (found := re.search(r"http://127\S+", line)) is not None:
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=server.stderr.read, daemon=True).start()
        if args.profile:
            input(f"server {server.pid}; press enter ")
        before, began = cpu_seconds(server.pid), time.perf_counter()
        streams = run_loop(lambda: load(found[0], args))
        assert isinstance(streams, list)
        spent, wall = cpu_seconds(server.pid) - before, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait(20)
    made = json.loads(stamps.read_text())
    added: list[float] = []
    lost = 0
    for stream in streams:
        arrivals = stream.tokens(ids)
        lost += args.tokens - len(arrivals)
        steps = [token - FIRST for _, token in arrivals]
        if any(after <= before for before, after in pairwise(steps)):
            raise SystemExit(f"tokens came twice or out of order: {steps}")
        added += [stamp - made[step] for (stamp, _), step in zip(arrivals, steps, strict=True)]
    p50, p90, p99, worst = np.quantile(added, [0.5, 0.9, 0.99, 1]) * 1e3
    print(
        f"{mode:6} {len(added) / wall:5.0f} tokens/s over {args.streams} streams: engine to client "
        f"p50 {p50:.3f} ms, p90 {p90:.3f}, p99 {p99:.3f}, max {worst:.1f}; "
        f"{spent / len(added) * 1e6:.0f} us of CPU a token ({spent / wall:.0%} of a core); "
        f"{lost} lost",
        flush=True,
    )


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rate", type=float, default=5000)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--modes", nargs="+", default=["spread", "steps"])
    parser.add_argument("--profile", action="store_true", help="wait before each load")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = tokenizer(VOCAB)
        made.save(str(folder / "tokenizer.json"))
        template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        ids = {word.removeprefix("\u0120"): i for word, i in made.get_vocab().items()}
        for mode in args.modes:
            measure(mode, folder, ids, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-engine"]:
        run_engine(sys.argv[2])
    elif sys.argv[1:2] == ["--as-server"]:
        sys.exit(run_server())
    else:
        main()
