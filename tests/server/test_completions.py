"""/v1/completions: what each field does, as clients see it.

Breaks for: OpenAI's and vLLM's clients, evaluation harnesses that score prompts, load generators.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import events
from fake_engine import EOS, FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

PATH = "/v1/completions"
FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"


async def post(client: Any, **body: Any) -> Any:
    reply = await client.post(PATH, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def stream(client: Any, **body: Any) -> list[Any]:
    reply = await client.post(PATH, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    found = events(reply.content)
    assert found.pop() == "[DONE]"
    return found


async def test_a_completion_says_what_the_engine_said(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("hello world", cached=3)
    async with connect(engine) as client:
        reply = await post(client, model="tiny", prompt="Hi!", max_tokens=50)
    assert reply["id"].startswith("cmpl-")
    assert reply["object"] == "text_completion"
    assert reply["model"] == "tiny"
    assert reply["choices"] == [
        {
            "index": 0,
            "text": "hello world",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert reply["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 12,  # eos counts
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert engine.submitted[0].prompt == tuple(b"Hi!")


async def test_sixteen_tokens_unless_told_otherwise(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("x" * 30)
    async with connect(engine) as client:
        reply = await post(client, prompt="a")
    assert reply["choices"][0]["text"] == "x" * 16
    assert reply["choices"][0]["finish_reason"] == "length"


async def test_every_sampling_field_reaches_the_engine(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    fields = {
        "n": 2,
        "max_tokens": 9,
        "min_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": -0.4,
        "seed": -7,
        "ignore_eos": True,
        "logprobs": 4,
        "prompt_logprobs": 2,
    }
    async with connect(engine) as client:
        await post(
            client,
            prompt="abc",
            logit_bias={"65": -100, "66": 1.5},
            stop_token_ids=[1, 2],
            allowed_token_ids=[65, 66, 67],
            bad_words=["no"],
            priority=-3,
            **fields,
        )
    [request] = engine.submitted
    params = request.params
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {65: -100.0, 66: 1.5}
    assert params.stop_token_ids == (1, 2)
    assert params.allowed_token_ids == (65, 66, 67)
    assert params.bad_token_ids == (tuple(b"no"), tuple(b" no"))
    assert request.priority == -3


async def test_a_temperature_near_zero_is_greedy(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        await post(client, prompt="a", temperature=1e-9)
    assert engine.submitted[0].params.temperature == 0.0


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [(97, 98)]),
        (["ab", "c"], [(97, 98), (99,)]),
        ([5, 6], [(5, 6)]),
        ([[5, 6], [7]], [(5, 6), (7,)]),
        ("<|bos|>a", [(256, 97)]),
    ],
)
async def test_prompts_of_every_form(
    connect: Callable[..., Any], prompt: Any, ids: list[Any]
) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        await post(client, prompt=prompt)
    assert [request.prompt for request in engine.submitted] == ids
    assert len({request.request_id for request in engine.submitted}) == len(ids)


async def test_choices_of_several_prompts_are_in_order(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine("first", "second!")) as client:
        reply = await post(client, prompt=["a", "b"], n=2)
        chunks = await stream(client, prompt=["a", "b"], n=2)
    texts = ["first", "second!"] * 2
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in reply["choices"]] == texts
    assert reply["usage"]["completion_tokens"] == 28
    assert reply["usage"]["prompt_tokens"] == 2
    streamed = [""] * 4
    for chunk in chunks:
        [choice] = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


async def test_stop_strings_end_a_choice_and_free_it(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("one two three", "abc", tokens_per_step=2)
    async with connect(engine) as client:
        reply = await post(client, prompt="a", n=2, stop=["two", "three"])
        told = await post(client, prompt="a", stop="tw", include_stop_str_in_output=True)
    first, second = reply["choices"]
    assert (first["text"], first["finish_reason"], first["stop_reason"]) == ("one ", "stop", "two")
    assert (second["text"], second["stop_reason"]) == ("abc", None)
    request_id = engine.submitted[0].request_id
    assert engine.aborted[0] == (request_id, 0)
    assert reply["usage"]["completion_tokens"] == len("one two") + len("abc") + 1
    assert told["choices"][0]["text"] == "one tw"
    assert engine.live == 0


async def test_a_stop_string_never_leaks_into_a_stream(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine("say STOP now")) as client:
        chunks = await stream(client, prompt="a", stop="STOP!")
        cut = await stream(client, prompt="a", stop="STOP")
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == "say STOP now"
    assert "STOP " in texts
    texts = [chunk["choices"][0]["text"] for chunk in cut]
    assert "".join(texts) == "say "
    assert cut[-1]["choices"][0]["stop_reason"] == "STOP"


async def test_stop_tokens_and_eos_are_told_apart(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine("abcdef")) as client:
        by_token = await post(client, prompt="a", stop_token_ids=[99])
        shown = await post(client, prompt="a", stop_token_ids=[99], include_stop_str_in_output=True)
        special = await post(client, prompt="a", skip_special_tokens=False)
        ignored = await post(client, prompt="a", skip_special_tokens=False, ignore_eos=True)
    [choice] = by_token["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("ab", "stop", 99)
    assert shown["choices"][0]["text"] == "abc"
    assert special["choices"][0]["text"] == "abcdef"  # the eos that ended it is not text
    assert ignored["choices"][0]["text"] == "abcdef<|eos|>"


async def test_logprobs_are_parallel_lists(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine(b"A\xe2\x82\xac")) as client:
        reply = await post(client, prompt="a", logprobs=2, max_tokens=4)
        named = await post(
            client, prompt="a", logprobs=0, max_tokens=1, return_tokens_as_token_ids=True
        )
        chunks = await stream(client, prompt="a", logprobs=2, max_tokens=4)
    logprobs = reply["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["A", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["top_logprobs"][0] == {"A": -0.5, "B": -0.6}
    assert logprobs["text_offset"] == [0, 1, 1, 1]
    assert named["choices"][0]["logprobs"]["tokens"] == ["token_id:65"]
    assert named["choices"][0]["logprobs"]["top_logprobs"] == [{"token_id:65": -0.5}]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert len(streamed) == 4  # also while a code point is incomplete
    for field, values in logprobs.items():
        assert [value for part in streamed for value in part[field]] == values


async def test_echo_scores_a_prompt_as_lm_eval_asks(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("xyz")
    async with connect(engine) as client:
        reply = await post(
            client, prompt=[[65, 66, 67], [68]], max_tokens=1, temperature=0, logprobs=1, echo=True
        )
    first, second = reply["choices"]
    assert first["text"] == "ABCx"
    assert first["logprobs"]["tokens"] == ["A", "B", "C", "x"]
    assert first["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert first["logprobs"]["top_logprobs"] == [None, {"B": -0.5}, {"C": -0.5}, {"x": -0.5}]
    assert first["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert second["text"] == "Dx"
    assert engine.submitted[0].params.prompt_logprobs == 1


async def test_echo_without_tokens_gives_the_prompt_alone(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("xyz")
    async with connect(engine) as client:
        reply = await post(client, prompt="h€", max_tokens=0, logprobs=0, echo=True)
        bare = await post(client, prompt="h€", max_tokens=0, echo=True)
    [choice] = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("h€", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 1]
    assert reply["usage"]["completion_tokens"] == 0
    assert engine.submitted[0].params.max_tokens == 1
    assert bare["choices"][0]["text"] == "h€"
    assert engine.live == 0


async def test_echo_in_a_stream_comes_first(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine("xyz", "uvw")) as client:
        whole = await post(client, prompt="ab", echo=True, logprobs=0, n=2)
        chunks = await stream(client, prompt="ab", echo=True, logprobs=0, n=2)
    for index in (0, 1):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        told = whole["choices"][index]
        assert "".join(part["text"] for part in parts) == told["text"]
        assert told["text"] == "ab" + ("xyz", "uvw")[index]
        offsets = [
            o for part in parts for o in (part["logprobs"] or {"text_offset": []})["text_offset"]
        ]
        assert offsets == told["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5]


async def test_prompt_logprobs_have_their_own_field(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        reply = await post(client, prompt="ab", prompt_logprobs=1)
    assert reply["choices"][0]["prompt_logprobs"] == [
        None,
        {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}},
    ]
    assert reply["choices"][0]["logprobs"] is None


async def test_token_ids_are_returned_on_request(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine("hi")) as client:
        [choice] = (await post(client, prompt="ab", return_token_ids=True))["choices"]
        chunks = await stream(client, prompt="ab", return_token_ids=True)
    assert choice["token_ids"] == [*b"hi", EOS]
    assert choice["prompt_token_ids"] == [97, 98]
    parts = [chunk["choices"][0] for chunk in chunks]
    assert [part["token_ids"] for part in parts] == [[104], [105], [EOS]]
    assert ["prompt_token_ids" in part for part in parts] == [True, False, False]


async def test_usage_in_streams(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine("hi", cached=1)) as client:
        plain = await stream(client, prompt="ab")
        last = await stream(client, prompt="ab", stream_options={"include_usage": True})
        each = await stream(client, prompt="ab", stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in plain)
    assert [chunk["usage"] for chunk in last[:-1]] == [None] * (len(last) - 1)
    assert last[-1]["choices"] == []
    assert last[-1]["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert [chunk["usage"]["completion_tokens"] for chunk in each] == [1, 2, 3]


async def test_prompts_are_truncated_as_asked(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        await post(client, prompt="abcdef", truncate_prompt_tokens=2)
        await post(client, prompt="abcdef", truncate_prompt_tokens=2, truncation_side="right")
        await post(client, prompt="z" * 1000, truncate_prompt_tokens=-1, max_tokens=6)
    assert [bytes(r.prompt) for r in engine.submitted] == [b"ef", b"ab", b"z" * 250]


async def test_the_models_own_defaults_come_before_openais(
    connect: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.3, "top_k": 7, "max_new_tokens": 5, "do_sample": true}'
    )
    engine = FakeEngine()
    async with connect(engine, folder=tmp_path) as client:
        await post(client, prompt="a")
        await post(client, prompt="a", temperature=0.9, max_tokens=2)
    first, second = (request.params for request in engine.submitted)
    assert (first.temperature, first.top_k, first.max_tokens) == (0.3, 7, 5)
    assert (second.temperature, second.top_k, second.max_tokens) == (0.9, 7, 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    said=st.lists(st.one_of(st.text(max_size=5).map(str.encode), st.binary(max_size=3))),
    stops=st.lists(st.text("ab€", min_size=1, max_size=2), max_size=2),
    per_step=st.integers(1, 4),
    max_tokens=st.integers(1, 30),
)
async def test_a_streams_deltas_add_up_to_the_whole_reply(
    connect: Callable[..., Any],
    said: list[bytes],
    stops: list[str],
    per_step: int,
    max_tokens: int,
) -> None:
    body = {"prompt": "a", "stop": stops, "max_tokens": max_tokens, "return_token_ids": True}
    async with connect(FakeEngine(b"".join(said), tokens_per_step=per_step)) as client:
        [whole] = (await post(client, **body))["choices"]
        parts = [chunk["choices"][0] for chunk in await stream(client, **body)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [t for part in parts for t in part["token_ids"]] == whole["token_ids"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
    assert parts[-1]["stop_reason"] == whole["stop_reason"]
    assert all(part["finish_reason"] is None for part in parts[:-1])
    assert not any(stop in whole["text"] for stop in stops)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    said=st.lists(
        st.one_of(st.text(max_size=5).map(str.encode), st.binary(max_size=3), st.just(b"<tool"))
    ),
    stops=st.lists(st.text("ab€", min_size=1, max_size=2), max_size=2),
    per_step=st.integers(1, 4),
    with_tools=st.booleans(),
)
async def test_a_chat_streams_deltas_add_up_to_the_whole_answer(
    connect: Callable[..., Any],
    said: list[bytes],
    stops: list[str],
    per_step: int,
    with_tools: bool,
) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a"}],
        "stop": stops,
        "truncate_prompt_tokens": 50,
    }
    if with_tools:
        body["tools"] = [{"type": "function", "function": {"name": "f"}}]
    path = "/v1/chat/completions"
    async with connect(FakeEngine(b"".join(said), tokens_per_step=per_step)) as client:
        [whole] = (await client.post(path, json=body)).json()["choices"]
        reply = await client.post(path, json={**body, "stream": True})
    parts = [event["choices"][0] for event in events(reply.content)[:-1]]
    text = "".join(part["delta"].get("content", "") for part in parts)
    assert text == whole["message"]["content"]
    assert parts[-1]["finish_reason"] == whole["finish_reason"]
