"""OpenAI's own Python client against the app, unchanged.

Breaks for: everybody who only changes `base_url`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import httpx
import openai
import pytest
from fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def openai_client(serve: Callable[..., Any]) -> Callable[..., openai.AsyncOpenAI]:
    def made(engine: FakeEngine, key: str = "k", **options: Any) -> openai.AsyncOpenAI:
        transport = httpx.ASGITransport(serve(engine, api_keys=("k",), **options))
        return openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key=key,
            max_retries=0,
            http_client=cast("Any", httpx.AsyncClient(transport=transport)),
        )

    return made


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
