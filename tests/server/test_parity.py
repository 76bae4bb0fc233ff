"""State that was corrupted in silence is found: a greedy output is computed again and compared.

Breaks for: everybody whose answers a wrong page or a wrong convolution window made worse, while
every request ended with 200; and, if a check got in their way, everybody who waits.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from asgi_call import WAIT
from convserve.engine.local import LocalClient
from convserve.engine.messages import EngineStats, Grammar, Logprobs, SamplingParams
from convserve.server.parity import GreedyOutput, ParityChecks, is_checkable
from fake_engine import FakeEngine
from mock_model import MockModel, mock_core, mock_info

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from convserve.engine.models import ForwardBatch
    from convserve.server.metrics import Metrics
    from torch import Tensor

URL = "/v1/completions"
PROMPT = [3, 1, 4, 1, 5]
BODY = {"prompt": PROMPT, "max_tokens": 10, "temperature": 0}


class Liar(MockModel):
    """Says another token than its state calls for, in steps of one row from a position on."""

    def __init__(self, lies_from: int) -> None:
        super().__init__()
        self.lies_from = lies_from

    def forward(self, batch: ForwardBatch) -> Tensor:
        logits = super().forward(batch)
        assert batch.flat.spans is not None
        wanted = {row: place for place, row in enumerate(batch.logit_rows.tolist())}
        row = 0
        for start, rows in batch.flat.spans:
            if rows == 1 and start >= self.lies_from:
                logits[wanted[row]] = torch.roll(logits[wanted[row]], 1)
            row += rows
        return logits


@asynccontextmanager
async def served(
    model: MockModel, connect: Callable[..., Any], **options: Any
) -> AsyncIterator[Any]:
    core = mock_core(model)
    engine = LocalClient(core, mock_info(core))
    async with connect(engine, **options) as client:
        yield client
    await engine.close()


async def figures(client: Any) -> tuple[int, ...]:
    """(checks, mismatches, skipped)"""
    text = (await client.get("/metrics")).text
    names = ("checks", "mismatch", "skipped")
    found = [re.search(rf"^convserve_parity_{n}_total\{{.*\}} (\S+)$", text, re.M) for n in names]
    return tuple(int(float(match[1])) for match in found if match)


async def settled(client: Any, count: int) -> tuple[int, ...]:
    """The figures once `count` outputs were checked or skipped."""
    async with asyncio.timeout(WAIT):
        while sum((now := await figures(client))[::2]) < count:
            await asyncio.sleep(0.01)
    return now


async def test_an_honest_engine_is_found_honest(connect: Callable[..., Any]) -> None:
    async with served(MockModel(), connect, parity_check=1) as client:
        for count in (1, 2):
            assert (await client.post(URL, json=BODY)).status_code == 200
            assert await settled(client, count) == (count, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lie_is_counted_and_told_with_its_place(
    connect: Callable[..., Any], caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async with served(Liar(lies_from=9), connect, parity_check=1) as client:
        reply = await client.post(URL, json={**BODY, "stream": stream})
        request_id = re.search(r"cmpl-(\w+)", reply.text)
        assert request_id is not None
        assert await settled(client, 1) == (1, 1, 0)
    # row 9 is the output's token 4, and says token 5
    [told] = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert re.match(rf"{request_id[1]}-0: token 5 of the output \(id \d+\) is 1 nats below", told)
    assert "so are 5 of 10 tokens" in told


async def test_a_share_of_nothing_checks_nothing(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("hello")
    async with connect(engine) as client:
        await client.post(URL, json={"prompt": "a", "temperature": 0})
        assert await figures(client) == (0, 0, 0)
    assert len(engine.submitted) == 1


async def test_only_what_has_one_right_answer_is_checked() -> None:
    greedy = SamplingParams(temperature=0)
    assert is_checkable(greedy)
    assert is_checkable(msgspec.structs.replace(greedy, logprobs=3, stop_token_ids=(3,)))
    for changed in (
        {"temperature": 1.0}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1}, {"logit_bias": {1: 1.0}}, {"allowed_token_ids": (1,)},
        {"bad_token_ids": ((1,),)}, {"grammar": Grammar("regex", "a")}, {"min_tokens": 1},
    ):  # fmt: skip
        assert not is_checkable(msgspec.structs.replace(greedy, **changed)), changed


async def test_the_share_is_of_requests(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        metrics: Metrics = client._transport.app.state.service.metrics
    draws = iter([0.24, 0.25, 0.9, 0.0])
    checks = ParityChecks(engine, metrics, 0.25, draw=lambda: next(draws))
    picks = [checks.wants(SamplingParams(temperature=0)) for _ in range(4)]
    assert picks == [True, False, False, True]


async def test_a_check_never_joins_a_queue_and_leaves_when_one_forms(
    connect: Callable[..., Any],
) -> None:
    engine = FakeEngine("hello", auto=False)
    async with connect(engine, parity_check=1) as client:
        checks: ParityChecks = client._transport.app.state.service.parity
        output = GreedyOutput("r", (1, 2), [3], "salt")
        checks.offer(output)
        checks.offer(output)  # one at a time
        assert await figures(client) == (0, 0, 1)
        async with asyncio.timeout(WAIT):
            while not engine.submitted:
                await asyncio.sleep(0)
        [request] = engine.submitted
        assert (request.prompt, request.priority, request.cache_salt) == ((1, 2, 3), 2**31, "salt")
        engine.totals = EngineStats(waiting=1)
        assert await settled(client, 2) == (0, 0, 2)
        async with asyncio.timeout(WAIT):
            while not engine.aborted:
                await asyncio.sleep(0.01)
        assert engine.live == 0
        checks.offer(output)
        assert await figures(client) == (0, 0, 3)


@pytest.mark.parametrize(
    ("below", "dtype", "mismatches"),
    [(0.0, "float32", 0), (0.002, "float32", 1), (0.4, "bfloat16", 0), (0.6, "bfloat16", 1),
     (0.05, "float16", 0), (float("nan"), "bfloat16", 1)],
)  # fmt: skip
async def test_what_rounding_explains_is_no_mismatch(
    connect: Callable[..., Any], below: float, dtype: str, mismatches: int
) -> None:
    class Rounded(FakeEngine):
        info = msgspec.structs.replace(FakeEngine.info, dtype=dtype)

        def _say(self, running: Any, index: int) -> Any:
            event = super()._say(running, index)
            if event.prompt_logprobs is None:
                return event
            scores = (None, *[Logprobs(7, -1.0 - below, 2, ((8, -1.0),))] * 3)
            return msgspec.structs.replace(event, prompt_logprobs=scores)

    async with connect(Rounded("hello"), parity_check=1) as client:
        checks: ParityChecks = client._transport.app.state.service.parity
        checks.offer(GreedyOutput("r", (1, 2), [7, 7], ""))
        assert await settled(client, 1) == (1, mismatches, 0)


async def test_an_engine_that_dies_leaves_no_check_behind(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("hello", auto=False)
    async with connect(engine, parity_check=1) as client:
        checks: ParityChecks = client._transport.app.state.service.parity
        checks.offer(GreedyOutput("r", (1, 2), [7], ""))
        await asyncio.sleep(0)
        engine.die()
        await checks.close()
        assert await figures(client) == (0, 0, 0)
