"""Cached prefixes are shared under one key and salt only, and can be forgotten.

Breaks for: tenants, whose prompts others could guess by how soon a first token comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable

URLS = ("/v1/completions", "/v1/chat/completions")
KEYS = ("first-key", "second-key")


def body(url: str, **fields: Any) -> dict[str, Any]:
    ask = {"prompt": "a"} if url == URLS[0] else {"messages": [{"role": "user", "content": "a"}]}
    return {**ask, "max_tokens": 1, **fields}


@pytest.mark.parametrize("url", URLS)
async def test_key_and_salt_set_requests_apart(connect: Callable[..., Any], url: str) -> None:
    engine = FakeEngine()
    asked = [(key, salt) for key in KEYS for salt in (None, "s", "t")]
    async with connect(engine, api_keys=KEYS) as client:
        for _ in range(2):
            for key, salt in asked:
                headers = {"Authorization": f"Bearer {key}"}
                reply = await client.post(url, json=body(url, cache_salt=salt), headers=headers)
                assert reply.status_code == 200
    salts = [request.cache_salt for request in engine.submitted]
    assert salts[:6] == salts[6:]
    assert len(set(salts)) == 6


async def test_without_keys_all_share_unless_salted(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        for salt in (None, "s", "s", "x" * 128):
            await client.post(URLS[0], json=body(URLS[0], cache_salt=salt))
    plain, first, second, other = [request.cache_salt for request in engine.submitted]
    assert plain == ""
    assert first == second
    assert len({plain, first, other}) == 3


@pytest.mark.parametrize("salt", ["", "x" * 129, "a@b", "a/b", "a\\b", "a\0b", 3, ["s"]])
async def test_a_salt_that_is_not_fit_is_refused(connect: Callable[..., Any], salt: Any) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        reply = await client.post(URLS[0], json=body(URLS[0], cache_salt=salt))
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "cache_salt")
    assert not engine.submitted


async def test_the_cache_can_be_forgotten(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        reply = await client.post("/reset_prefix_cache")
        assert (reply.status_code, reply.content, engine.resets) == (200, b"", 1)
        engine.die()
        assert (await client.post("/reset_prefix_cache")).status_code == 503
    assert engine.resets == 1


async def test_forgetting_wants_a_key(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine, api_keys=KEYS) as client:
        assert (await client.post("/reset_prefix_cache")).status_code == 401
    assert engine.resets == 0


async def test_usage_tells_what_was_cached(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine(cached=16)) as client:
        ask = {"prompt": ["a" * 20, "b" * 20], "n": 2, "max_tokens": 1}
        usage = (await client.post(URLS[0], json=ask)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}
