"""What a client says its output must be reaches the engine as a grammar, in every form there is.

Breaks for: clients that parse what comes back, and whoever shares a server with a hostile one.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import events
from convserve.engine.messages import Grammar
from fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable

URLS = ("/v1/completions", "/v1/chat/completions")
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ANY = Grammar("json_schema", '{"type": "object"}')
GIVEN = Grammar("json_schema", json.dumps(SCHEMA))

FORMS: list[tuple[dict[str, Any], Grammar | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ANY),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        GIVEN,
    ),
    ({"structured_outputs": {"json": SCHEMA}}, GIVEN),
    ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, GIVEN),
    ({"structured_outputs": {"json_object": True}}, ANY),
    ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
    ({"structured_outputs": {"choice": ['a"', "é\n"]}}, Grammar("lark", r'start: "a\"" | "é\n"')),
    ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, Grammar("gbnf", 'root ::= "a"')),
    ({"structured_outputs": {"json": None, "disable_any_whitespace": False}}, None),
    ({"guided_json": SCHEMA}, GIVEN),
    ({"guided_regex": "a+"}, Grammar("regex", "a+")),
    ({"guided_choice": ["a"]}, Grammar("lark", 'start: "a"')),
    ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
]


def body(url: str, **fields: Any) -> dict[str, Any]:
    ask = {"prompt": "a"} if url == URLS[0] else {"messages": [{"role": "user", "content": "a"}]}
    return {**ask, **fields}


@pytest.mark.parametrize("url", URLS)
async def test_every_form_becomes_a_grammar(connect: Callable[..., Any], url: str) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        for fields, grammar in FORMS:
            reply = await client.post(url, json=body(url, **fields))
            assert reply.status_code == 200, reply.text
            assert engine.submitted[-1].params.grammar == grammar


async def test_a_grammar_that_fails_while_it_runs_is_the_clients_error(
    connect: Callable[..., Any],
) -> None:
    engine = FakeEngine()
    engine.fail_with = "grammar: lexer error: too many states"
    async with connect(engine) as client:
        asked = body(URLS[0], structured_outputs={"regex": "a+"})
        reply = await client.post(URLS[0], json=asked)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["param"] == "structured_outputs.regex"
        assert error["message"] == "structured_outputs.regex: lexer error: too many states"
        # the same words, from a request that has no grammar, are our fault
        assert (await client.post(URLS[0], json=body(URLS[0]))).status_code == 500


async def test_few_may_wait_for_their_check(
    connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convserve.server.service.MAX_GRAMMAR_CHECKS", 0)
    async with connect(FakeEngine()) as client:
        reply = await client.post(URLS[0], json=body(URLS[0], guided_regex="a"))
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert (await client.post(URLS[0], json=body(URLS[0]))).status_code == 200


async def test_a_grammar_that_kills_its_check_leaves_the_others_alone(
    connect: Callable[..., Any],
) -> None:
    deep = "start: T0\n" + "\n".join(f'T{i}: T{i + 1} "a"' for i in range(3000)) + '\nT3000: "b"'
    engine = FakeEngine("hi")
    async with connect(engine) as client:
        for stream in (True, False):
            asked = body(URLS[0], guided_grammar=deep, stream=stream)
            reply = await client.post(URLS[0], json=asked)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] == "guided_grammar"
        assert not engine.submitted
        reply = await client.post(URLS[0], json=body(URLS[0], guided_regex="a+", stream=True))
        assert events(reply.content)[-1] == "[DONE]"
