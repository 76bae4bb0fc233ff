"""A reader that falls behind the engine: what queued up comes as one event, in order and whole.

Breaks for: many streams on a server whose HTTP side is at its limit; it would never catch up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from convserve.engine.client import EngineDeadError
from convserve.engine.messages import (
    EngineStats,
    GenerateRequest,
    Logprobs,
    SamplingParams,
    StepReport,
    TokenEvent,
)
from convserve.engine.streams import RequestStreams
from fake_engine import INFO

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Behind:
    """A request whose reader waits for its first event, and later finds others queued up."""

    def __init__(self, n: int = 1) -> None:
        self.streams = RequestStreams(INFO, lambda _: None)
        params = SamplingParams(n=n, max_tokens=9)
        request = GenerateRequest(request_id="r", prompt=(1,), params=params)
        self.events: AsyncGenerator[TokenEvent, None] = self.streams.submit(request)

    async def begin(self) -> None:
        """Reads one event as it comes."""
        reading = asyncio.ensure_future(anext(self.events))
        await asyncio.sleep(0)
        self.tell(0)
        assert (await reading).token_ids == (0,)

    def tell(self, *tokens: int, index: int = 0, **fields: Any) -> None:
        logprobs = tuple(Logprobs(token, -0.5, 1) for token in tokens)
        event = TokenEvent("r", index, tokens, logprobs=logprobs, **fields)
        self.streams.receive(StepReport((event,), EngineStats()))


async def test_tokens_that_queued_up_come_together() -> None:
    behind = Behind()
    await behind.begin()
    behind.tell(1)
    behind.tell(2, 3)
    behind.tell(4, finish_reason="stop", stop_token=4)
    [event] = [event async for event in behind.events]
    assert event.token_ids == (1, 2, 3, 4)
    assert [entry.token_id for entry in event.logprobs] == [1, 2, 3, 4]
    assert (event.finish_reason, event.stop_token) == ("stop", 4)


async def test_choices_are_not_mixed() -> None:
    behind = Behind(n=2)
    await behind.begin()
    for token in (1, 2):
        behind.tell(token)
    behind.tell(7, index=1)
    behind.tell(3, finish_reason="length")
    behind.tell(8, index=1, finish_reason="length")
    got = [(event.index, event.token_ids) async for event in behind.events]
    assert got == [(0, (1, 2)), (1, (7,)), (0, (3,)), (1, (8,))]


async def test_a_failure_follows_the_tokens_before_it() -> None:
    behind = Behind()
    await behind.begin()
    behind.tell(1)
    behind.tell(2)
    behind.tell(finish_reason="error", error="out of pages")
    got = [(event.token_ids, event.finish_reason) async for event in behind.events]
    assert got == [((1, 2), None), ((), "error")]


async def test_a_death_follows_the_tokens_before_it() -> None:
    behind = Behind()
    await behind.begin()
    behind.tell(1)
    behind.tell(2)
    behind.streams.die("killed")
    assert (await anext(behind.events)).token_ids == (1, 2)
    with pytest.raises(EngineDeadError):
        await anext(behind.events)
