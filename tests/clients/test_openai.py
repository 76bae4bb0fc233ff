"""openai-python against a running server and a real model: sync, async, streamed, raw.

Breaks for: everybody who only changes `base_url`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from running import Served

MESSAGES: Any = [{"role": "user", "content": "Name three colours."}]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def ask(server: Served) -> dict[str, Any]:
    return {"model": server.model, "temperature": 0, "max_tokens": 24}


def test_sync_and_streamed_say_the_same(client: openai.OpenAI, ask: dict[str, Any]) -> None:
    whole = client.completions.create(prompt=PROMPT, **ask)
    pieces = client.completions.create(prompt=PROMPT, stream=True, **ask)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert "Paris" in whole.choices[0].text
    answer = client.chat.completions.create(messages=MESSAGES, **ask)
    deltas = list(
        client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **ask
        )
    )
    told = "".join(d.choices[0].delta.content or "" for d in deltas if d.choices)
    assert told == answer.choices[0].message.content
    assert deltas[-1].choices == []
    assert deltas[-1].usage is not None
    assert answer.usage is not None
    assert deltas[-1].usage.total_tokens == answer.usage.total_tokens


async def test_async_agrees_with_sync(
    server: Served, client: openai.OpenAI, ask: dict[str, Any]
) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, **ask)
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0
    ) as other:
        assert [model.id async for model in other.models.list()] == [server.model]
        again = await other.chat.completions.create(messages=MESSAGES, **ask)
        assert again.choices[0].message.content == whole.choices[0].message.content
        text = ""
        async for chunk in await other.chat.completions.create(
            messages=MESSAGES, stream=True, **ask
        ):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content


def test_the_stream_helper_accumulates(client: openai.OpenAI, ask: dict[str, Any]) -> None:
    with client.chat.completions.stream(messages=MESSAGES, stop=[","], **ask) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.delta") > 3
    assert kinds[-1] == "content.done"
    assert final.choices[0].message.content
    assert final.choices[0].finish_reason == "stop"


def test_raw_responses_show_headers_and_bytes(client: openai.OpenAI, ask: dict[str, Any]) -> None:
    raw = client.completions.with_raw_response.create(
        prompt=PROMPT, extra_headers={"X-Request-Id": "mine-1"}, **ask
    )
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-request-id"] == "mine-1"
    assert raw.parse().choices[0].text
    with client.chat.completions.with_streaming_response.create(
        messages=MESSAGES, stream=True, **ask
    ) as live:
        assert live.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in live.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert [c["choices"][0]["finish_reason"] for c in chunks].count("length") == 1


def test_logprobs_of_both_kinds_come_from_the_same_numbers(
    client: openai.OpenAI, ask: dict[str, Any]
) -> None:
    reply = client.completions.create(prompt=PROMPT, logprobs=3, **ask)
    found = reply.choices[0].logprobs
    assert found is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    # greedy: the chosen token is the best of its rivals, to the last digit
    assert found.token_logprobs == [max(top.values()) for top in found.top_logprobs]
    answer = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=2, **ask)
    entries = answer.choices[0].logprobs
    assert entries is not None
    assert entries.content is not None
    assert all(entry.logprob == entry.top_logprobs[0].logprob for entry in entries.content)
    assert "".join(e.token for e in entries.content) == answer.choices[0].message.content


def test_a_stream_that_is_left_frees_its_place(client: openai.OpenAI, ask: dict[str, Any]) -> None:
    for _ in range(3):
        with client.completions.create(
            prompt=PROMPT,
            stream=True,
            extra_body={"ignore_eos": True},
            **{**ask, "max_tokens": 500},
        ) as stream:
            next(iter(stream))
    assert client.completions.create(prompt=PROMPT, **ask).choices[0].text


def test_refusals_are_the_clients_own_exceptions(
    client: openai.OpenAI, ask: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(prompt=PROMPT, **{**ask, "max_tokens": -1})
    with pytest.raises(openai.NotFoundError):
        client.completions.create(prompt=PROMPT, **{**ask, "model": "gpt-9"})
