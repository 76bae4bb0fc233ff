"""A mock server process for the whole folder, and short ways to run a load against it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from convserve.loadtest.client import Client, ClientOptions
from convserve.loadtest.generator import Generator
from convserve.loadtest.http import Pool, Target
from convserve.loadtest.plan import Plan
from convserve.loadtest.prompts import PromptPlan
from convserve.loadtest.scenario import make_scenario
from mocked import Mock, running_mock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convserve.loadtest.records import AuditSample, RequestRecord


@pytest.fixture(scope="session")
def mock_process() -> Iterator[Mock]:
    with running_mock() as mock:
        yield mock


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
