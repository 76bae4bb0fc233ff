"""A mock server process for the whole folder, and short ways to run a load against it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import Request, urlopen

import msgspec
import pytest
from convserve.loadtest.client import Client, ClientOptions
from convserve.loadtest.generator import Generator
from convserve.loadtest.http import Pool, Target
from convserve.loadtest.plan import Plan
from convserve.loadtest.prompts import PromptPlan
from convserve.loadtest.scenario import make_scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convserve.loadtest.records import AuditSample, RequestRecord


class Mock:
    """The mock server's remote control."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def program(self, **fields: Any) -> None:
        request = Request(f"{self.url}/program", data=msgspec.json.encode(fields))
        with urlopen(request) as answer:
            assert answer.status == 200

    def log(self) -> list[dict[str, Any]]:
        with urlopen(f"{self.url}/log") as answer:
            return msgspec.json.decode(answer.read())


@pytest.fixture(scope="session")
def mock_process() -> Iterator[Mock]:
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "mock_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield Mock(int(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@pytest.fixture
def mock(mock_process: Mock) -> Mock:
    mock_process.program()
    return mock_process


class Load(NamedTuple):
    """What a load left behind."""

    records: list[RequestRecord]
    audit: AuditSample
    origin: float
    plan: Plan
    abandoned_turns: int


Loader = Callable[..., Awaitable[Load]]


@pytest.fixture
def load(mock: Mock) -> Loader:
    """Runs a scenario in this process; `beside` runs along with it."""

    async def run(
        table: dict[str, Any],
        *,
        canary: str | None = None,
        beside: Callable[[], Awaitable[None]] | None = None,
        url: str | None = None,
        **options: Any,
    ) -> Load:
        scenario = make_scenario(table)
        pool = Pool(Target(url or mock.url), keep_alive=options.get("keep_alive", True))
        client = Client(pool, ClientOptions(**options))
        prompts = PromptPlan(kind="ids", vocab=1000)
        if scenario.request.endpoint == "chat":
            prompts = PromptPlan(kind="text", tokens_per_word=1.25, overhead=7)
        plan = Plan(scenario, prompts, "mock")
        generator = Generator(client, plan, canary=canary)
        generator.prepare()
        await generator.warm_up()
        origin = perf_counter() + 0.02
        other = asyncio.ensure_future(beside()) if beside else None
        audit = await generator.run(origin)
        if other is not None:
            other.cancel()
        pool.close()
        records = sorted(generator.records, key=lambda r: (r.intended, r.index))
        return Load(records, audit, origin, plan, generator.abandoned_turns)

    return run
