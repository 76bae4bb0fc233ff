"""Whoever waits for an engine hears from it: tokens, an end, or its death, and never nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from convserve.engine.client import EngineDeadError, EngineStartError
from convserve.engine.config import EngineConfig
from convserve.engine.local import LocalClient
from convserve.engine.messages import StepReport, TokenEvent
from convserve.engine.process import ProcessClient
from convserve.engine.wire import frame, reply_decoder
from golden import GOLDEN
from mock_model import MockModel, continuation, mock_core, mock_info, request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from convserve.engine.client import EngineClient

FOLDER = str(GOLDEN / "models" / "dynconv_lowrank_qkv")


async def tokens_of(events: AsyncIterator[TokenEvent]) -> list[int]:
    return [token async for event in events for token in event.token_ids]


async def until(condition: object, seconds: float = 10.0) -> None:
    """Waits for a condition that another thread or process will make true."""
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


def is_idle(client: EngineClient) -> bool:
    s = client.stats
    return s.running == s.waiting == s.pages_used == s.slots_used == 0


class BrokenModel(MockModel):
    def forward(self, batch: object) -> object:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise MemoryError("no room for activations")


async def test_local_requests_run_together() -> None:
    core = mock_core()
    client = LocalClient(core, mock_info(core))
    prompts = [[1, 2, 3], [4], [5, 6]]
    streams = [client.submit(request(str(i), p, 9)) for i, p in enumerate(prompts)]
    outputs = await asyncio.gather(*map(tokens_of, streams))
    assert outputs == [continuation(p, 9) for p in prompts]
    await client.close()


async def test_leaving_a_stream_frees_the_request() -> None:
    core = mock_core(num_pages=256)
    client = LocalClient(core, mock_info(core))
    stream = client.submit(request("r", [1, 2], 900))
    async for _ in stream:
        break
    await stream.aclose()
    await until(lambda: is_idle(client))
    await client.close()


async def test_aborting_one_choice_then_all() -> None:
    core = mock_core(num_pages=256)
    client = LocalClient(core, mock_info(core))
    seen: set[int] = set()
    async for event in client.submit(request("r", [1, 2], 900, n=3)):
        seen.add(event.index)
        client.abort("r", event.index)
    assert seen == {0, 1, 2}
    await until(lambda: is_idle(client))
    client.abort("r")
    client.abort("unknown")
    await client.close()


async def test_a_request_the_engine_refuses_ends_with_the_reason() -> None:
    core = mock_core(max_model_len=8)
    client = LocalClient(core, mock_info(core))
    for bad, word in (
        (request("a", range(8), 1), "8 tokens"),
        (request("b", [96, 97], 1), "outside 0..96"),
        (request("c", [1], 0), "max_tokens"),
    ):
        events = [event async for event in client.submit(bad)]
        assert [e.finish_reason for e in events] == ["error"]
        assert word in (events[0].error or "")
    assert await tokens_of(client.submit(request("d", [1], 2))) == continuation([1], 2)
    await client.close()


async def test_a_step_that_fails_reaches_every_waiter() -> None:
    core = mock_core(BrokenModel())
    client = LocalClient(core, mock_info(core))
    with pytest.raises(EngineDeadError, match="no room for activations"):
        await tokens_of(client.submit(request("r", [1, 2], 9)))
    assert not client.is_alive
    with pytest.raises(EngineDeadError):
        await tokens_of(client.submit(request("late", [1], 1)))
    await asyncio.wait_for(client.wait_dead(), 5)


async def test_closing_ends_open_streams_with_abort() -> None:
    core = mock_core(num_pages=1024)
    client = LocalClient(core, mock_info(core))
    events: list[TokenEvent] = []
    started = asyncio.Event()

    async def listen() -> None:
        async for event in client.submit(request("r", [1, 2], 4000)):
            events.append(event)
            started.set()

    task = asyncio.create_task(listen())
    await started.wait()
    await client.close()
    await task
    assert events[-1].finish_reason == "abort"


async def test_engine_process_serves_and_dies_loudly() -> None:
    client = await ProcessClient.start(EngineConfig(model=FOLDER, memory="16MiB"))
    assert client.info.conv.startswith("lowrank, width 4")
    once = await tokens_of(client.submit(request("a", [1, 2, 3], 12)))
    again = await tokens_of(client.submit(request("b", [1, 2, 3], 12)))
    assert once == again
    assert len(once) == 12
    await until(lambda: is_idle(client))

    stream = client.submit(request("c", [1, 2, 3], 400))
    await anext(stream)
    os.kill(client.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(EngineDeadError):
        await tokens_of(stream)
    assert time.monotonic() - killed_at < 1.0
    assert not client.is_alive
    assert await asyncio.wait_for(client.wait_dead(), 5) == -signal.SIGKILL
    await client.close()


async def test_engine_process_ends_when_told_and_when_left_alone() -> None:
    client = await ProcessClient.start(EngineConfig(model=FOLDER, memory="16MiB"))
    await client.close()
    assert await client.wait_dead() == 0
    client = await ProcessClient.start(EngineConfig(model=FOLDER, memory="16MiB"))
    client._writer.close()  # as if this process were gone
    assert await asyncio.wait_for(client.wait_dead(), 5) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "nowhere"}, "nowhere: no such folder"),
        ({"model": str(GOLDEN)}, "not a model folder"),
        ({"model": FOLDER, "memory": "1KiB"}, "too small"),
        ({"model": FOLDER, "memory": "lots"}, "'lots'"),
        ({"model": FOLDER, "page_size": 24}, "power of two"),
        ({"model": FOLDER, "max_model_len": 9999}, "more than the model's 512"),
        ({"model": FOLDER, "device": "cuda"}, "no CUDA device"),
        ({"model": FOLDER, "dtype": "float16"}, "float16 is not supported on a CPU"),
    ],
)
async def test_start_errors_are_one_line(options: dict[str, object], words: str) -> None:
    config = EngineConfig(**options)  # pyright: ignore[reportArgumentType]
    if config.device == "cuda":
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    from convserve.engine.models import ModelError
    from convserve.engine.resolve import ConfigError
    from convserve.engine.start import start_engine

    with pytest.raises((ModelError, ConfigError)) as raised:
        start_engine(config)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


async def test_start_errors_cross_the_process_wall() -> None:
    with pytest.raises(EngineStartError, match="nowhere: no such folder"):
        await ProcessClient.start(EngineConfig(model="nowhere"))


def test_frames_are_checked_against_their_types() -> None:
    core = mock_core()
    event = TokenEvent("r", 0, (1, 2), finish_reason="stop", stop_token=2)
    report = StepReport((event,), core.stats())
    assert reply_decoder.decode(frame(report)[4:]) == report
    with pytest.raises(ValueError, match="Expected"):
        reply_decoder.decode(frame(StepReport(("no event",), core.stats()))[4:])  # pyright: ignore[reportArgumentType]
