"""A stream's life: when headers go out, what keeps it alive, and the one end that each has.

Breaks for: clients that wait for ever, and servers whose engine works for nobody.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import WAIT, AsgiCall, events
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = "/v1/completions"
ASK = {"prompt": "a", "stream": True}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0)


async def started(engine: FakeEngine, call: AsgiCall) -> None:
    """Waits for the engine to have the request, or for the call to have failed."""
    await until(lambda: engine.live > 0 or call.task.done())


async def test_headers_wait_for_the_first_token(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hi", auto=False)
    call = AsgiCall(serve(engine), "POST", PATH, ASK)
    await started(engine, call)
    for _ in range(50):
        await asyncio.sleep(0)
    assert not call.has_message
    engine.step()
    await call.until(b'"text":"h"')
    assert call.status == 200
    assert call.headers["cache-control"] == "no-cache"
    assert call.headers["x-accel-buffering"] == "no"
    engine.step()
    engine.step()
    assert events(await call.finish())[-1] == "[DONE]"


async def test_a_token_is_sent_as_soon_as_it_is_there(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("abc", auto=False)
    call = AsgiCall(serve(engine), "POST", PATH, ASK)
    await started(engine, call)
    for char in "abc":
        engine.step()
        await call.until(f'"text":"{char}"'.encode())
        assert not call.has_message
    engine.step()
    await call.finish()


async def test_silence_is_broken_by_comments(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hi", auto=False)
    call = AsgiCall(serve(engine, keep_alive_seconds=0.01), "POST", PATH, ASK)
    await started(engine, call)
    await call.until(b": keep-alive\n\n: keep-alive\n\n")
    assert call.status == 200
    for _ in range(3):
        engine.step()
    found = events(await call.finish())
    assert "".join(chunk["choices"][0]["text"] for chunk in found[:-1]) == "hi"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_stops_the_engine(
    serve: Callable[..., Any], stream: bool
) -> None:
    engine = FakeEngine("a long story", "another", auto=False)
    app = serve(engine)
    call = AsgiCall(app, "POST", PATH, {"prompt": ["a", "b"], "n": 2, "stream": stream})
    await until(lambda: engine.live == 2)
    engine.step()
    if stream:
        await call.until(b'"index":3')
    call.disconnect()
    await asyncio.wait_for(call.task, WAIT)
    assert engine.live == 0
    assert sorted(request_id for request_id, _ in engine.aborted) == sorted(
        request.request_id for request in engine.submitted
    )
    service = app.state.service
    assert service.lifecycle.live == 0
    figures = service.metrics.render().decode()
    assert 'convserve_client_disconnects_total{model_name="tiny"} 1.0' in figures
    assert 'finished_total{finished_reason="abort",model_name="tiny"} 4.0' in figures
    assert f'requests_total{{model_name="tiny",route="{PATH}",status="499"}} 1.0' in figures


async def test_a_client_that_leaves_before_the_first_token(serve: Callable[..., Any]) -> None:
    engine = FakeEngine(auto=False)
    call = AsgiCall(serve(engine), "POST", PATH, ASK)
    await started(engine, call)
    call.disconnect()
    await asyncio.wait_for(call.task, WAIT)
    assert engine.live == 0
    assert not call.has_message


async def test_a_client_that_does_not_read_is_dropped(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("x" * 100)
    app = serve(engine, send_seconds=0.01)
    call = AsgiCall(app, "POST", PATH, {**ASK, "max_tokens": 100})
    call.stuck.clear()
    await asyncio.wait_for(call.task, WAIT)
    assert engine.live == 0
    assert (
        'slow_readers_total{model_name="tiny"} 1.0' in app.state.service.metrics.render().decode()
    )


async def test_death_in_mid_stream_is_an_error_event_and_done(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hello", auto=False)
    call = AsgiCall(serve(engine), "POST", PATH, ASK)
    await started(engine, call)
    engine.step()
    await call.until(b'"text":"h"')
    engine.die()
    *_, error, done = events(await call.finish())
    assert call.status == 200
    assert error["error"]["code"] == 503
    assert done == "[DONE]"


async def test_death_before_the_first_token_is_a_503(serve: Callable[..., Any]) -> None:
    for stream in (True, False):
        engine = FakeEngine(auto=False)
        app = serve(engine)
        call = AsgiCall(app, "POST", PATH, {"prompt": ["a", "b"], "stream": stream})
        await until(lambda engine=engine: engine.live == 2)
        engine.die()
        assert json.loads(await call.finish())["error"]["code"] == 503
        assert call.status == 503
        assert call.headers["retry-after"] == "5"
        for path, status in (("/ready", 503), ("/health", 503), ("/version", 200)):
            probe = AsgiCall(app, "GET", path)
            await probe.finish()
            assert probe.status == status
        late = AsgiCall(app, "POST", PATH, ASK)
        await late.finish()
        assert late.status == 503


async def test_shutting_down_ends_streams_with_an_error_event(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hello", auto=False)
    call = AsgiCall(serve(engine), "POST", PATH, ASK)
    await started(engine, call)
    engine.step()
    await call.until(b'"text":"h"')
    await engine.close()
    *_, error, done = events(await call.finish())
    assert (error["error"]["code"], done) == (503, "[DONE]")


async def test_the_deadline_has_a_status_before_and_an_event_after_the_first_token(
    serve: Callable[..., Any],
) -> None:
    engine = FakeEngine("hello", auto=False)
    app = serve(engine, deadline_seconds=0.05)
    late = [AsgiCall(app, "POST", PATH, {"prompt": "a", "stream": s}) for s in (True, False)]
    for call in late:
        body = json.loads(await call.finish())
        assert (call.status, body["error"]["code"]) == (408, 408)
    call = AsgiCall(app, "POST", PATH, ASK)
    await started(engine, call)
    engine.step()
    *_, error, done = events(await call.finish())
    assert (call.status, error["error"]["code"], done) == (200, 408, "[DONE]")
    assert engine.live == 0


async def test_the_queue_is_bounded(serve: Callable[..., Any]) -> None:
    engine = FakeEngine(auto=False)  # runs 4
    app = serve(engine, max_queue=2)
    calls = [AsgiCall(app, "POST", PATH, {**ASK, "n": 3}) for _ in range(2)]
    await until(lambda: engine.live == 2)
    over = AsgiCall(app, "POST", PATH, ASK)
    assert json.loads(await over.finish())["error"]["type"] == "RateLimitError"
    assert over.status == 429
    assert int(over.headers["retry-after"]) >= 1
    for call in calls:
        call.disconnect()
        await asyncio.wait_for(call.task, WAIT)
    engine.auto = True
    again = AsgiCall(app, "POST", PATH, ASK)
    await again.finish()
    assert again.status == 200
    figures = app.state.service.metrics.render().decode()
    assert 'rejections_total{model_name="tiny",reason="queue_full"} 1.0' in figures


async def test_draining_lets_streams_end_and_takes_nothing_new(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hi", auto=False)
    app = serve(engine)
    call = AsgiCall(app, "POST", PATH, ASK)
    await started(engine, call)
    engine.step()
    lifecycle = app.state.service.lifecycle
    drained = asyncio.ensure_future(lifecycle.drain(WAIT))
    await asyncio.sleep(0)
    for method, path in (("POST", PATH), ("GET", "/ready")):
        refused = AsgiCall(app, method, path, ASK)
        await refused.finish()
        assert refused.status == 503
    assert not drained.done()
    engine.step()
    engine.step()
    assert events(await call.finish())[-1] == "[DONE]"
    assert await drained


async def test_draining_gives_up_in_time(serve: Callable[..., Any]) -> None:
    engine = FakeEngine(auto=False)
    app = serve(engine)
    call = AsgiCall(app, "POST", PATH, ASK)
    await started(engine, call)
    assert not await app.state.service.lifecycle.drain(0.01)
    call.disconnect()
    await asyncio.wait_for(call.task, WAIT)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    moves=st.lists(st.sampled_from(["step", "step", "yield", "die", "close", "fail", "leave"])),
    stream=st.booleans(),
    prompts=st.integers(1, 3),
    n=st.integers(1, 2),
    stop=st.sampled_from([[], ["b"], ["cd"]]),
)
async def test_whatever_happens_each_reply_ends_exactly_once(
    serve: Callable[..., Any],
    moves: list[str],
    stream: bool,
    prompts: int,
    n: int,
    stop: list[str],
) -> None:
    engine = FakeEngine("abc", "abcdef", auto=False)
    app = serve(engine)
    body = {"prompt": ["a"] * prompts, "n": n, "stream": stream, "stop": stop}
    call = AsgiCall(app, "POST", PATH, body)
    await until(lambda: engine.live == prompts)
    left = False
    for move in moves:
        if move == "step":
            engine.step()
        elif move == "die":
            engine.die()
        elif move == "close":
            await engine.close()
        elif move == "fail":
            engine.fail_with = "broken"
        elif move == "leave":
            left = True
            call.disconnect()
        await asyncio.sleep(0)
    if not left:
        engine.auto = True
        engine._schedule()
        found = await call.finish()
        if call.status != 200:
            assert list(json.loads(found)) == ["error"]
        elif stream:
            parts = events(found)
            assert parts.count("[DONE]") == 1
            assert parts[-1] == "[DONE]"
            failed = ["error" in part for part in parts[:-1]]
            assert sum(failed) <= 1
            assert not any(failed[:-1])
            ends = [
                choice["index"]
                for part in parts[:-1]
                for choice in part.get("choices", ())
                if choice["finish_reason"] is not None
            ]
            assert len(ends) == len(set(ends))
            if not any(failed):
                assert sorted(ends) == list(range(prompts * n))
    await asyncio.wait_for(call.task, WAIT)
    assert engine.live == 0
    assert app.state.service.lifecycle.live == 0


@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}])
@pytest.mark.parametrize(
    ("path", "ask"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
async def test_every_chunk_says_the_same_around_its_text(
    connect: Callable[..., Any], path: str, ask: dict[str, Any], usage: dict[str, Any]
) -> None:
    said = 'a "text":"" \\ \n "content":"" \u20ac'
    name = '"text":"" "content":""\\'  # a client's or an operator's text must not be taken for ours
    async with connect(FakeEngine(said), model_names=(name,)) as client:
        body = {**ask, **usage, "n": 2, "max_tokens": 99, "stream": True}
        streamed = (await client.post(path, json=body)).content
    chunks = [chunk for chunk in events(streamed)[:-1] if chunk["choices"]]
    texts = ["", ""]
    heads: set[str] = set()
    for chunk in chunks:
        [choice] = chunk["choices"]
        delta = choice.get("delta", choice)
        texts[choice["index"]] += delta.get("text", delta.get("content", ""))
        is_plain = choice["finish_reason"] is None and "role" not in delta
        delta["text" if "text" in delta else "content"] = ""
        if is_plain and choice["index"] == 0:
            heads.add(json.dumps(chunk))
    assert texts == [said, said]
    assert len(heads) == 1
    assert ("usage" in chunks[1]) == bool(usage)
    assert all(chunk["model"] == name for chunk in chunks)
