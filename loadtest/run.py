"""One run from question to result: asks the server what it is, starts workers, gathers, judges.

The parent's side. It sends no measured request itself. Knows nothing of how results are shown.
"""

from __future__ import annotations

import asyncio
import sys
from datetime import UTC, datetime
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from .client import Client, ClientOptions, Outgoing
from .context import check_context, served_context
from .early import EarlyStop
from .environment import client_environment, served_model, server_environment
from .http import Pool, Target
from .plan import Plan
from .prompts import CalibrationError, PromptPlan, make_prompt_plan, prompt_body
from .result import Result, summarise
from .scrape import Scraper
from .worker import (
    Begin,
    Broken,
    Done,
    Finish,
    FromWorker,
    Job,
    Progress,
    Ready,
    Stop,
    pack,
    read_frame,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from .audit import AuditLimits
    from .records import RequestRecord
    from .scenario import Scenario

_FRAME_LIMIT = 1 << 31
_HEAD_START = 0.15


class RunError(RuntimeError):
    """A run that could not be made; the message is one line fit for a person."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a run needs besides its scenario."""

    url: str
    model: str | None = None
    """None: the first that /v1/models names."""
    api_key: str | None = None
    workers: int = 1
    scrape: bool = True
    command: list[str] = []

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What was learned of the server before any load."""

    model: str
    server: dict[str, object]
    vendor_fields: bool
    prompts: PromptPlan


async def probe(settings: Settings, scenario: Scenario) -> Probe:
    """Asks the server for its model, the fields it takes and how prompts are counted.

    Raises:
        RunError: it does not answer, or refuses.
    """
    pool = Pool(Target(settings.url), settings.headers)
    try:
        server = await server_environment(pool)
        model = settings.model or served_model(server)
        shape = scenario.request
        if model is None:
            await _must_answer(pool, settings.url)
            raise RunError(f"{settings.url}: /v1/models names no model; give --model")
        vendor = shape.vendor_fields
        if vendor == "auto":
            vendor = await _takes_vendor_fields(pool, model, scenario)
        extra = scenario.traffic[0].extra
        prompts = await make_prompt_plan(pool, model, shape, extra)
    except CalibrationError as error:
        raise RunError(f"{settings.url}: {error}") from error
    finally:
        pool.close()
    return Probe(model=model, server=server, vendor_fields=vendor, prompts=prompts)


async def _must_answer(pool: Pool, url: str) -> None:
    try:
        connection, _ = await pool.acquire(fresh=True)
    except Exception as error:
        raise RunError(f"{url}: {error}") from error
    connection.abort()


async def _takes_vendor_fields(pool: Pool, model: str, scenario: Scenario) -> bool:
    endpoint = scenario.request.endpoint
    outgoing = Outgoing(
        index=0,
        endpoint=endpoint,
        body={"model": model, "ignore_eos": True, **prompt_body(endpoint, "Hello")},
        max_tokens=2,
    )
    client = Client(pool, ClientOptions(timeout=scenario.request.timeout))
    client.origin = perf_counter()
    answer = await client.send(outgoing, 0.0)
    if answer.outcome in ("refused", "connect_error") or answer.status in (401, 403, 404):
        raise RunError(f"{pool.target.url}: {answer.message}")
    return answer.status not in (400, 422)


async def _learn_canary(job: Job) -> str | None:
    """The canary's right answer: given, or asked for now while the server is alone with us."""
    canary = job.scenario.canary
    if not canary.every:
        return None
    if canary.expected is not None:
        return canary.expected
    pool = Pool(Target(job.url), job.headers)
    client = Client(pool, job.options)
    client.origin = perf_counter()
    outgoing = Plan(job.scenario, job.prompts, job.model).canary(0, None)
    answer = await client.send(outgoing, 0.0)
    pool.close()
    if answer.outcome != "ok" or answer.sink is None:
        raise RunError(f"canary: {answer.outcome}: {answer.message}")
    return "".join(answer.sink.text)


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._decode = msgspec.msgpack.Decoder(FromWorker).decode

    @classmethod
    async def start(cls, job: Job) -> Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            f"{__package__}.worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_FRAME_LIMIT,
        )
        worker = cls(process)
        worker.send(job)
        return worker

    def send(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(pack(message))

    async def receive(self) -> FromWorker:
        """The next message. Raises RunError if the worker is gone or broken."""
        assert self._process.stdout is not None
        frame = await read_frame(self._process.stdout)
        if frame is None:
            raise RunError(f"a worker process died (exit code {await self._process.wait()})")
        message = self._decode(frame)
        if isinstance(message, Broken):
            raise RunError(f"worker: {message.message}")
        return message

    async def close(self) -> None:
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


async def run(
    scenario: Scenario,
    settings: Settings,
    *,
    known: Probe | None = None,
    on_progress: Callable[[Progress, int], None] | None = None,
    interrupt: asyncio.Event | None = None,
    audit_limits: AuditLimits | None = None,
) -> tuple[Result, list[RequestRecord]]:
    """Makes one run.

    Args:
        known: what an earlier probe of the same server found.
        on_progress: called for each message of each worker, with the worker's number.
        interrupt: when set, the load is given up and what there is becomes the result.

    Returns:
        (result, all records).

    Raises:
        RunError: the server does not answer, its context is too short, or a worker fails.
    """
    found = known or await probe(settings, scenario)
    limit = served_context(found.server, found.model)
    if limit is not None:
        try:
            check_context(scenario, found.prompts, found.model, limit)
        except ValueError as error:
            raise RunError(str(error)) from error
    shape = scenario.request
    job = Job(
        url=settings.url,
        headers=settings.headers,
        model=found.model,
        scenario=scenario,
        prompts=found.prompts,
        options=ClientOptions(
            timeout=shape.timeout,
            retries=shape.retries,
            honour_retry_after=shape.honour_retry_after,
            keep_alive=shape.keep_alive,
            vendor_fields=found.vendor_fields,
        ),
    )
    job = msgspec.structs.replace(job, canary=await _learn_canary(job))
    workers = [
        await Worker.start(msgspec.structs.replace(job, share=(number, settings.workers)))
        for number in range(settings.workers)
    ]
    pool = Pool(Target(settings.url), settings.headers)
    scraper = Scraper(pool)
    watch: asyncio.Task[None] | None = None
    stopper = asyncio.create_task(_stop_when(interrupt, workers)) if interrupt else None
    early = EarlyStop(scenario)

    def progressed(progress: Progress, number: int) -> None:
        if on_progress is not None:
            on_progress(progress, number)
        if early.reason is None:
            early.update(progress, number)
            if early.reason is not None:
                for worker in workers:
                    worker.send(Finish())

    try:
        for worker in workers:
            first = await worker.receive()
            assert isinstance(first, Ready)
        if settings.scrape:
            watch = asyncio.create_task(scraper.run())
        started = datetime.now(UTC).isoformat(timespec="milliseconds")
        origin = perf_counter() + _HEAD_START
        for worker in workers:
            worker.send(Begin(origin=origin))
        done = await asyncio.gather(
            *(_collect(worker, number, progressed) for number, worker in enumerate(workers))
        )
    finally:
        for task in (watch, stopper):
            if task is not None:
                task.cancel()
        await asyncio.gather(*(worker.close() for worker in workers))
        pool.close()
    records = [record for part in done for record in part.records]
    result = summarise(
        scenario=scenario,
        records=records,
        samples=[part.audit for part in done],
        prompts=found.prompts,
        target=settings.url,
        model=found.model,
        started=started,
        command=settings.command,
        vendor_fields=found.vendor_fields,
        environment=client_environment(),
        server=found.server,
        abandoned_turns=sum(part.abandoned_turns for part in done),
        interrupted=interrupt is not None and interrupt.is_set(),
        audit_limits=audit_limits,
        server_metrics=scraper.series(origin),
        stopped=early.reason,
    )
    return result, records


async def _stop_when(interrupt: asyncio.Event, workers: list[Worker]) -> None:
    await interrupt.wait()
    for worker in workers:
        worker.send(Stop())


async def _collect(
    worker: Worker, number: int, on_progress: Callable[[Progress, int], None]
) -> Done:
    while True:
        message = await worker.receive()
        if isinstance(message, Done):
            return message
        if isinstance(message, Progress):
            on_progress(message, number)
