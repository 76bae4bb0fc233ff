"""/v1/responses: OpenAI's newer form, in one piece and as events, by its own client.

Breaks for: clients whose library speaks nothing else.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import WAIT, AsgiCall
from convserve.engine.messages import Grammar
from convserve.engine.text import TextTokenizer
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

    import openai

PATH = "/v1/responses"
TOKENIZER = TextTokenizer.from_folder(Path(__file__).parents[1] / "data" / "tokenizer")


def events(stream: bytes) -> list[dict[str, Any]]:
    """The events of a stream, whose names are their types and whose numbers have no gap."""
    found = []
    for number, block in enumerate(stream.decode().removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        found.append(event)
    return found


async def test_an_answer(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("Hello!", cached=2)
    async with connect(engine) as client:
        asked = {
            "model": "tiny",
            "instructions": "Be nice",
            "input": [
                {"role": "user", "content": "a"},
                {"type": "message", "role": "assistant", "content": "b"},
                {"role": "user", "content": [{"type": "input_text", "text": t} for t in "cd"]},
            ],
            "temperature": 0.5,
            "max_output_tokens": 20,
            "metadata": {"k": "v"},
        }
        reply = (await client.post(PATH, json=asked)).json()
    assert TOKENIZER.decode(engine.submitted[0].prompt) == (
        "system: Be nice\nuser: a\nassistant: b\nuser: c\nd\nassistant: "
    )
    assert engine.submitted[0].params.temperature == 0.5
    assert engine.submitted[0].params.max_tokens == 20
    assert reply["id"].startswith("resp_")
    assert (reply["object"], reply["status"], reply["error"]) == ("response", "completed", None)
    [item] = reply["output"]
    assert item["content"] == [
        {"type": "output_text", "text": "Hello!", "annotations": [], "logprobs": []}
    ]
    assert reply["usage"] == {
        "input_tokens": 58,
        "input_tokens_details": {"cached_tokens": 2},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 65,
    }
    assert (reply["metadata"], reply["store"], reply["instructions"]) == (
        {"k": "v"},
        False,
        "Be nice",
    )


@pytest.mark.parametrize("stop", ["completed", "incomplete"])
async def test_the_events_add_up_to_the_whole_answer(
    connect: Callable[..., Any], stop: str
) -> None:
    asked: dict[str, Any] = {"input": "a", "max_output_tokens": 3 if stop == "incomplete" else 99}
    async with connect(FakeEngine("h€llo")) as client:
        whole = (await client.post(PATH, json=asked)).json()
        reply = await client.post(PATH, json={**asked, "stream": True})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(reply.content)
    kinds = [event["type"].removeprefix("response.") for event in found]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * deltas,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        stop,
    ]
    text = "".join(event.get("delta", "") for event in found)
    assert text == found[-4]["text"] == whole["output"][0]["content"][0]["text"]
    last = found[-1]["response"]
    assert last["status"] == whole["status"] == stop
    for field in whole.keys() - {"id", "created_at", "output"}:
        assert last[field] == whole[field], field
    assert found[-3]["part"] == last["output"][0]["content"][0]
    assert found[-2]["item"] == last["output"][0]
    assert found[0]["response"]["status"] == "in_progress"


async def test_the_text_can_have_a_format(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("{}")
    schema = {"type": "object"}
    async with connect(engine) as client:
        for form in ({"type": "json_schema", "name": "x", "schema": schema}, {"type": "text"}):
            reply = await client.post(PATH, json={"input": "a", "text": {"format": form}})
            assert reply.status_code == 200, reply.text
    grammars = [request.params.grammar for request in engine.submitted]
    assert grammars == [Grammar("json_schema", json.dumps(schema)), None]


BAD: list[tuple[str, Any]] = [
    ("input", ""),
    ("input", []),
    ("input", 3),
    ("input", "x" * 300),
    ("input[0].type", [{"type": "function_call_output", "call_id": "1", "output": "x"}]),
    ("input[0].role", [{"role": "tool", "content": "x"}]),
    (
        "input[0].content[0].type",
        [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}],
    ),
    ("max_output_tokens", 0),
    ("temperature", -1),
    ("top_p", 2),
    ("text.format", {"format": {"type": "json_schema", "schema": {"type": "strin"}}}),
    ("text.format.schema", {"format": {"type": "json_schema"}}),
    ("text.verbosity", {"verbosity": "high"}),
    ("metadata", {str(i): "x" for i in range(17)}),
    # known and not supported: refused, never ignored
    ("background", True),
    ("conversation", "conv_1"),
    ("include[0]", ["reasoning.encrypted_content"]),
    ("max_tool_calls", 3),
    ("previous_response_id", "resp_1"),
    ("prompt", {"id": "p"}),
    ("reasoning", {"effort": "high"}),
    ("store", True),
    ("tool_choice", "required"),
    ("tools", [{"type": "function", "name": "f"}]),
    ("top_logprobs", 2),
    ("truncation", "auto"),
]


@pytest.mark.parametrize(("path", "value"), BAD, ids=lambda value: str(value)[:30])
async def test_a_bad_field_is_a_400_naming_it(
    connect: Callable[..., Any], path: str, value: Any
) -> None:
    field = path.partition("[")[0].partition(".")[0]
    engine = FakeEngine()
    async with connect(engine) as client:
        reply = await client.post(PATH, json={"input": "a", field: value})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["param"] == path, error
    assert error["message"].startswith(path)
    assert not engine.submitted


async def test_a_failure_in_mid_stream_is_the_last_event(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hello", die_after=2)
    call = AsgiCall(serve(engine), "POST", PATH, {"input": "a", "stream": True})
    *begun, last = events(await call.finish())
    assert call.status == 200
    assert [event["type"] for event in begun][-1] == "response.output_text.delta"
    assert (last["type"], last["code"]) == ("error", "503")
    assert last["message"] == "the engine has stopped"


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(st.sampled_from(["step", "step", "yield", "die", "close", "fail"])))
async def test_whatever_happens_a_stream_has_one_last_event(
    serve: Callable[..., Any], moves: list[str]
) -> None:
    engine = FakeEngine("abc", auto=False)
    call = AsgiCall(serve(engine), "POST", PATH, {"input": "a", "stream": True})
    while engine.live == 0:
        await asyncio.sleep(0)
    for move in moves:
        if move == "step":
            engine.step()
        elif move == "die":
            engine.die()
        elif move == "close":
            await engine.close()
        elif move == "fail":
            engine.fail_with = "broken"
        await asyncio.sleep(0)
    engine.auto = True
    engine._schedule()
    found = await call.finish()
    if call.status == 200:
        ends = [e["type"] for e in events(found) if e["type"] in ("response.completed", "error")]
        assert len(ends) == 1
        assert events(found)[-1]["type"] == ends[0]
    else:
        assert list(json.loads(found)) == ["error"]


async def test_a_failure_before_the_first_event_has_its_status(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hello", die_after=1)
    engine.fail_with = "broken"
    call = AsgiCall(serve(engine), "POST", PATH, {"input": "a", "stream": True})
    assert json.loads(await call.finish())["error"]["code"] == 500
    assert call.status == 500


async def test_a_client_that_leaves_frees_the_engine(serve: Callable[..., Any]) -> None:
    engine = FakeEngine("hello", auto=False)
    call = AsgiCall(serve(engine), "POST", PATH, {"input": "a", "stream": True})
    while engine.live == 0:
        await asyncio.sleep(0)
    engine.step()
    await call.until(b"output_text.delta")
    call.disconnect()
    await asyncio.wait_for(call.task, WAIT)
    assert engine.live == 0


async def test_openais_client(openai_client: Callable[..., openai.AsyncOpenAI]) -> None:
    async with openai_client(FakeEngine("hello", cached=4)) as client:
        reply = await client.responses.create(model="tiny", input="a", max_output_tokens=3)
        assert (reply.output_text, reply.status) == ("hel", "incomplete")
        assert reply.incomplete_details is not None
        assert reply.incomplete_details.reason == "max_output_tokens"
        assert reply.usage is not None
        assert reply.usage.input_tokens_details.cached_tokens == 4
        async with client.responses.stream(model="tiny", input="a") as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert final.output_text == "hello"


async def test_logprobs_of_the_text(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine("h\u20ac")) as client:
        include = ["message.output_text.logprobs"]
        asked = {"input": "a", "include": include, "top_logprobs": 2}
        reply = (await client.post(PATH, json=asked)).json()
        streamed = events((await client.post(PATH, json={**asked, "stream": True})).content)
        bare = (await client.post(PATH, json={"input": "a", "include": include})).json()
    [part] = reply["output"][0]["content"]
    assert reply["top_logprobs"] == 2
    told = [bytes(entry["bytes"]) for entry in part["logprobs"]]
    assert told == [b"h", b"\xe2", b"\x82", b"\xac", b"<|eos|>"]
    assert [len(entry["top_logprobs"]) for entry in part["logprobs"]] == [2] * 5
    assert part["logprobs"][0]["logprob"] == -0.5
    deltas = [e for e in streamed if e["type"] == "response.output_text.delta"]
    assert [entry for delta in deltas for entry in delta["logprobs"]] == part["logprobs"]
    assert "".join(delta["delta"] for delta in deltas) == part["text"] == "h\u20ac"
    [done] = [e for e in streamed if e["type"] == "response.output_text.done"]
    assert done["logprobs"] == part["logprobs"]
    assert streamed[-1]["response"]["output"][0]["content"] == [part]
    assert [e["top_logprobs"] for e in bare["output"][0]["content"][0]["logprobs"]] == [[]] * 5
