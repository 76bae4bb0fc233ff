"""OpenAI's own Python client against the app, unchanged.

Breaks for: everybody who only changes `base_url`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import openai
import pydantic
import pytest
from fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


async def test_models(openai_client: Callable[..., openai.AsyncOpenAI]) -> None:
    async with openai_client(FakeEngine()) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_completions(openai_client: Callable[..., openai.AsyncOpenAI]) -> None:
    async with openai_client(FakeEngine("hello")) as client:
        reply = await client.completions.create(
            model="tiny", prompt=["a", "b"], echo=True, logprobs=1, max_tokens=3
        )
        assert [choice.text for choice in reply.choices] == ["ahel", "bhel"]
        assert reply.choices[0].logprobs is not None
        assert reply.choices[0].logprobs.token_logprobs == [None, -0.5, -0.5, -0.5]
        stream = await client.completions.create(model="tiny", prompt="a", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello"


async def test_chat(openai_client: Callable[..., openai.AsyncOpenAI]) -> None:
    async with openai_client(FakeEngine("hello", cached=4)) as client:
        reply = await client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            max_completion_tokens=9,
            logprobs=True,
            top_logprobs=2,
            stop=["lo"],
        )
        [choice] = reply.choices
        assert (choice.message.content, choice.finish_reason) == ("hel", "stop")
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [entry.token for entry in choice.logprobs.content] == list("hello")
        assert reply.usage is not None
        assert reply.usage.prompt_tokens_details is not None
        assert reply.usage.prompt_tokens_details.cached_tokens == 4


async def test_chat_streams(openai_client: Callable[..., openai.AsyncOpenAI]) -> None:
    async with openai_client(FakeEngine("hello")) as client:
        text, usage = "", None
        async for chunk in await client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage
            for choice in chunk.choices:
                text += choice.delta.content or ""
        assert text == "hello"
        assert usage is not None
        assert usage.completion_tokens == 6


async def test_tools_and_formats(openai_client: Callable[..., openai.AsyncOpenAI]) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    said = 'Well: <tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call>'
    ask: Any = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": tools,
        "extra_body": {"truncate_prompt_tokens": 50},
    }
    async with openai_client(FakeEngine(said)) as client:
        reply = await client.chat.completions.create(**ask)
        [choice] = reply.choices
        assert (choice.message.content, choice.finish_reason) == ("Well:", "tool_calls")
        async with client.chat.completions.stream(**ask) as stream:
            final = await stream.get_final_completion()
        for message in (choice.message, final.choices[0].message):
            assert message.tool_calls is not None
            [call] = message.tool_calls
            assert call.type == "function"
            assert (call.function.name, call.function.arguments) == ("f", '{"a": 1}')


class Person(pydantic.BaseModel):
    name: str
    age: int


async def test_a_pydantic_model_is_a_format(
    openai_client: Callable[..., openai.AsyncOpenAI],
) -> None:
    engine = FakeEngine('{"name": "Ada", "age": 36}')
    async with openai_client(engine) as client:
        reply = await client.chat.completions.parse(
            model="tiny", messages=MESSAGES, response_format=Person
        )
        answer = await client.responses.parse(model="tiny", input="a", text_format=Person)
    assert reply.choices[0].message.parsed == Person(name="Ada", age=36)
    assert answer.output_parsed == Person(name="Ada", age=36)
    assert [request.params.grammar is not None for request in engine.submitted] == [True, True]


async def test_a_raw_reply_has_its_headers(
    openai_client: Callable[..., openai.AsyncOpenAI],
) -> None:
    async with openai_client(FakeEngine("hello")) as client:
        raw = await client.completions.with_raw_response.create(
            model="tiny", prompt="a", extra_headers={"X-Request-Id": "mine-1"}
        )
        assert raw.headers["x-request-id"] == "mine-1"
        assert raw.parse().choices[0].text == "hello"


async def test_errors_become_the_clients_exceptions(
    openai_client: Callable[..., openai.AsyncOpenAI],
) -> None:
    async with openai_client(FakeEngine()) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.completions.create(model="tiny", prompt="a", temperature=-1)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="gpt", prompt="a")
        assert missing.value.code == "model_not_found"
    async with openai_client(FakeEngine(), key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    async with openai_client(FakeEngine(), max_queue=0) as client:
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="a", n=5)


async def test_an_error_event_is_raised_in_mid_stream(
    openai_client: Callable[..., openai.AsyncOpenAI],
) -> None:
    async with openai_client(FakeEngine("hello", die_after=2)) as client:
        stream = await client.completions.create(model="tiny", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="the engine has stopped"):
            async for _ in stream:
                pass
