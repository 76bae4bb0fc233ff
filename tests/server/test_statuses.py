"""Every refusal: its status, its one JSON shape, and nothing it should not say.

Breaks for: clients that act on statuses, and operators whose paths and traces would leak.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import AsgiCall
from error_reply import error_of
from fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"prompt"',
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=range(11),
)
async def test_a_body_that_is_not_json_is_a_400(connect: Callable[..., Any], body: bytes) -> None:
    async with connect(FakeEngine()) as client:
        reply = await client.post(
            COMPLETIONS, content=body, headers={"content-type": "application/json"}
        )
    error_of(reply, 400)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
        (b'{"prompt": "a", "logit_bias": {"1": -1e400}}', "logit_bias"),
        (b'{"prompt": "a", "stop_token_ids": [1, ' + b"9" * 5000 + b"]}", "stop_token_ids"),
    ],
    ids=["float", "nested", "integer"],
)
async def test_a_number_that_nothing_can_hold_is_named(
    connect: Callable[..., Any], body: bytes, param: str
) -> None:
    headers = {"content-type": "application/json"}
    async with connect(FakeEngine()) as client:
        error = error_of(await client.post(COMPLETIONS, content=body, headers=headers), 400)
    assert error["param"] == param
    assert error["message"] == f"{param}: has a number that is out of range"


async def test_statuses_of_the_envelope(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine, max_body=2000) as client:
        error = error_of(await client.post(COMPLETIONS, json={"model": "gpt", "prompt": "a"}), 404)
        assert error["code"] == "model_not_found"
        assert error["param"] == "model"
        error_of(await client.get("/v1/models/gpt"), 404)
        error_of(await client.get("/nothing/here"), 404)
        reply = await client.get(COMPLETIONS)
        error_of(reply, 405)
        assert reply.headers["allow"] == "POST"
        error_of(await client.post(COMPLETIONS, json={"prompt": "x" * 2000}), 413)

        async def chunks() -> Any:
            for _ in range(3):
                yield b" " * 1000

        headers = {"content-type": "application/json"}
        error_of(await client.post(COMPLETIONS, content=chunks(), headers=headers), 413)
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            headers = {"content-type": kind}
            error_of(await client.post(COMPLETIONS, content=b"{}", headers=headers), 415)
        headers = {"content-type": "Application/JSON; charset=utf-8"}
        reply = await client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
        assert reply.status_code == 200
        error_of(await client.get("/health", headers={"x": "y" * 40_000}), 431)


async def test_a_body_that_does_not_come_is_a_408(serve: Callable[..., Any]) -> None:
    call = AsgiCall(serve(FakeEngine(), body_seconds=0.01), "POST", COMPLETIONS, b"")
    call._body = None  # nothing is ever received
    body = json.loads(await call.finish())
    assert (call.status, body["error"]["code"]) == (408, 408)


async def test_an_engines_failure_is_a_500_without_its_reason(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    engine.fail_with = "tensor at /secret/path is NaN"
    async with connect(engine) as client:
        reply = await client.post(COMPLETIONS, json={"prompt": "a"})
        error = error_of(reply, 500)
        assert reply.headers["x-request-id"] in error["message"]
        # before the first byte of a stream, a failure still has its own status
        error_of(await client.post(COMPLETIONS, json={"prompt": "a", "stream": True}), 500)
    assert engine.live == 0


async def test_a_bug_is_a_500_without_its_trace(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()

    def explode(*_: object) -> None:
        raise RuntimeError("/secret/file")

    monkeypatch.setattr(engine, "submit", explode)
    async with connect(engine) as client:
        error_of(await client.post(COMPLETIONS, json={"prompt": "a"}), 500)
        error_of(await client.post(COMPLETIONS, json={"prompt": "a", "stream": True}), 500)
        monkeypatch.setattr("convserve.server.routes_generate.sampling_params", explode)
        error_of(await client.post(COMPLETIONS, json={"prompt": "a"}), 500)
