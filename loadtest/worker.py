"""A worker process: makes its share of a load and sends home records, nothing else.

The process that draws tables must not share a thread with the one that stamps bytes, so even a
single worker is a process of its own. Frames of msgpack over stdin and stdout; the parent's clock
is ours (one monotonic clock per host).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import struct
import sys
from typing import TYPE_CHECKING

import msgspec

from .client import Client, ClientOptions
from .figures import e2e, itl_samples, tpot, ttft
from .generator import Generator
from .histogram import Histogram
from .http import Pool, Target
from .plan import Plan
from .prompts import PromptPlan  # noqa: TC001 decoded by type
from .records import AuditSample, RequestRecord
from .scenario import Scenario  # noqa: TC001 decoded by type

if TYPE_CHECKING:
    from collections.abc import Callable

PROGRESS_PERIOD = 0.25

Sparse = list[tuple[int, int]]


class Job(msgspec.Struct, frozen=True, kw_only=True, tag="job"):
    """What one worker is to do."""

    url: str
    headers: dict[str, str]
    model: str
    scenario: Scenario
    prompts: PromptPlan
    options: ClientOptions
    share: tuple[int, int] = (0, 1)
    canary: str | None = None


class Begin(msgspec.Struct, frozen=True, kw_only=True, tag="begin"):
    """The measured load starts at this `perf_counter`."""

    origin: float


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag="stop"):
    """Send nothing more and give up what is in flight."""


class Finish(msgspec.Struct, frozen=True, kw_only=True, tag="finish"):
    """Send nothing more, but await what is in flight."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """Sessions are made and the warm-up is over."""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress"):
    """What happened since the last one; counts add up over workers, histograms merge."""

    time: float
    launched: int = 0
    completed: int = 0
    failed: dict[str, int] = {}
    tokens: int = 0
    in_flight: int = 0
    """Now, not since."""
    latency: dict[str, Sparse] = {}
    """By figure: ttft, itl, tpot, e2e. Slow readers are left out."""


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """All that a worker has."""

    records: list[RequestRecord]
    audit: AuditSample
    abandoned_turns: int = 0


class Broken(msgspec.Struct, frozen=True, kw_only=True, tag="broken"):
    """The worker could not go on."""

    message: str


ToWorker = Job | Begin | Stop | Finish
FromWorker = Ready | Progress | Done | Broken

_LENGTH = struct.Struct("<I")


def pack(message: msgspec.Struct) -> bytes:
    """One frame."""
    payload = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(payload)) + payload


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The payload of one frame; None at the end of the stream."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        return None


class Reporter:
    """Turns a generator's growth into progress messages."""

    def __init__(self, generator: Generator, client: Client) -> None:
        self._generator = generator
        self._client = client
        self._seen = self._launched = self._tokens = 0

    def restart(self) -> None:
        """Forgets the warm-up."""
        self._seen = 0
        self._launched, self._tokens = self._generator.launched, self._client.counter.tokens

    def progress(self) -> Progress:
        generator = self._generator
        fresh = [r for r in generator.records[self._seen :] if r.kind == "load"]
        self._seen = len(generator.records)
        failed: dict[str, int] = {}
        for record in fresh:
            if record.failed:
                failed[record.outcome] = failed.get(record.outcome, 0) + 1
        timed = [record for record in fresh if not record.slow_reader]
        latency = {
            figure.__name__: Histogram.of([v for r in timed if (v := figure(r)) is not None])
            for figure in (ttft, tpot, e2e)
        }
        gaps = latency["itl"] = Histogram()
        for record in timed:
            gaps.record(itl_samples(record)[0])
        message = Progress(
            time=self._client.now(),
            launched=generator.launched - self._launched,
            completed=sum(r.completed for r in fresh),
            failed=failed,
            tokens=self._client.counter.tokens - self._tokens,
            in_flight=generator.in_flight,
            latency={name: found.to_sparse() for name, found in latency.items()},
        )
        self._launched, self._tokens = generator.launched, self._client.counter.tokens
        return message


async def work(
    job: Job,
    next_command: Callable[[], asyncio.Future[Begin | Stop | Finish]],
    send: Callable[[msgspec.Struct], None],
) -> None:
    """Runs one job: warm-up, `Ready`, wait for `Begin`, load with `Progress`, `Done`.

    A `Stop` before `Begin` ends it at once.
    """
    pool = Pool(
        Target(job.url),
        job.headers,
        connect_timeout=job.options.connect_timeout,
        keep_alive=job.options.keep_alive,
    )
    client = Client(pool, job.options)
    generator = Generator(client, Plan(job.scenario, job.prompts, job.model), job.share, job.canary)
    generator.prepare()
    command = next_command()
    warm_up = asyncio.ensure_future(generator.warm_up())
    await asyncio.wait({command, warm_up}, return_when=asyncio.FIRST_COMPLETED)
    if not warm_up.done():
        generator.stop()
    await warm_up
    if not job.scenario.load.warmup:
        await generator.connect()
    send(Ready())
    begin = await command
    if not isinstance(begin, Begin):
        send(Done(records=generator.records, audit=AuditSample()))
        return
    # collecting half a million live records would stop the clock for a while
    gc.collect()
    gc.freeze()
    gc.disable()
    reporter = Reporter(generator, client)
    reporter.restart()
    load = asyncio.ensure_future(generator.run(begin.origin))
    stop = next_command()
    while not load.done():
        await asyncio.wait({load, stop}, timeout=PROGRESS_PERIOD, return_when="FIRST_COMPLETED")
        if stop.done() and not load.done():
            if isinstance(stop.result(), Finish):
                generator.finish()
                stop = next_command()
            else:
                generator.stop()
                await asyncio.wait({load}, timeout=5)
        send(reporter.progress())
    pool.close()
    send(
        Done(
            records=generator.records,
            audit=load.result(),
            abandoned_turns=generator.abandoned_turns,
        )
    )


async def main() -> None:
    """Entry of the worker process."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    decode = msgspec.msgpack.Decoder(ToWorker).decode

    def send(message: msgspec.Struct) -> None:
        sys.stdout.buffer.write(pack(message))
        sys.stdout.buffer.flush()

    async def next_command() -> Begin | Stop | Finish:
        frame = await read_frame(reader)
        command = decode(frame) if frame is not None else Stop()
        assert not isinstance(command, Job)
        return command

    frame = await read_frame(reader)
    if frame is None:
        return
    job = decode(frame)
    assert isinstance(job, Job)
    try:
        await work(job, lambda: asyncio.ensure_future(next_command()), send)
    except (OSError, ValueError) as error:
        send(Broken(message=f"{type(error).__name__}: {error}"))


def run_loop(entry: Callable[[], object]) -> object:
    """Runs a coroutine function on the fastest event loop there is."""
    try:
        import uvloop
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(entry())  # pyright: ignore[reportArgumentType]


def _ask_for_promptness() -> None:
    """A stopwatch must not wait for the runner: takes little time, wants it at once."""
    with contextlib.suppress(AttributeError, PermissionError, OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)


if __name__ == "__main__":
    _ask_for_promptness()
    # an interrupt at the terminal reaches the whole group; the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_loop(main)
