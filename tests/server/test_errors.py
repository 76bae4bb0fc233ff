"""Every refusal: its status, its one JSON shape, the field it names, and nothing it should not say.

Breaks for: clients that act on statuses, and operators whose paths and traces would leak.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import AsgiCall
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


def error_of(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert len(reply.content) < 1000
    assert "/secret" not in reply.text
    assert "Traceback" not in reply.text
    return body["error"]


HUGE = "x" * 100_000

BAD_COMPLETIONS: list[tuple[str, Any]] = [
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["a", ""]),
    ("prompt", ["a", [1]]),
    ("prompt", ["a", 1]),
    ("prompt", [[1], 2]),
    ("prompt", {"a": 1}),
    ("prompt", [259]),
    ("prompt", [-1]),
    ("prompt", [2**63]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", "x" * 250),  # with 16 to generate
    ("prompt", HUGE),
    ("prompt", ["a"] * 257),
    ("n", 0),
    ("n", 129),
    ("n", "3"),
    ("n", 2.5),
    ("n", True),
    ("n", 10**30),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", "5"),
    ("min_tokens", 17),
    ("temperature", -1),
    ("temperature", 1e308),
    ("temperature", "hot"),
    ("temperature", 10**400),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_k", -2),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"259": 1}),
    ("logit_bias", {"99999999999999": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "1"}),
    ("logit_bias", [1]),
    ("seed", 2**63),
    ("stop", [""]),
    ("stop", ""),
    ("stop", ["a"] * 33),
    ("stop", HUGE),
    ("stop", 3),
    ("stop_token_ids", [259]),
    ("stop_token_ids", [0] * 129),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [259]),
    ("bad_words", ["  "]),
    ("bad_words", ["x" * 65]),
    ("bad_words", ["a"] * 257),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("prompt_logprobs", 21),
    ("prompt_logprobs", -1),
    ("truncate_prompt_tokens", 0),
    ("truncate_prompt_tokens", -2),
    ("truncate_prompt_tokens", 257),
    ("truncation_side", "middle"),
    ("stream_options", {"include_usage": True}),
    ("priority", 2**31),
    ("stream", "yes"),
    ("user", 3),
    # known and not supported: refused, never ignored
    ("suffix", "end"),
    ("best_of", 2),
    ("use_beam_search", True),
    ("length_penalty", 0.5),
    ("prompt_embeds", "AAAA"),
    ("guided_decoding_backend", "outlines"),
    # structured outputs
    ("response_format", {"type": "json"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": "{}"}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}),
    ("structured_outputs", {"regex": "(a"}),
    ("structured_outputs", {"regex": "a" * 70_000}),
    ("structured_outputs", {"choice": []}),
    ("structured_outputs", {"choice": ["a"] * 1025}),
    ("structured_outputs", {"choice": ["a", ""]}),
    ("structured_outputs", {"grammar": "start: missing"}),
    ("structured_outputs", {"grammar": "root ::= (("}),
    ("structured_outputs", {"json": "{"}),
    ("structured_outputs", {"json": {"$ref": "http://example.com/schema"}}),
    ("structured_outputs", {"structural_tag": "x"}),
    ("structured_outputs", 3),
    ("guided_json", {"not": {}}),
    ("guided_regex", "[a"),
    ("guided_choice", "a"),
    ("guided_grammar", "start: a"),
    ("logprob_token_ids", [1]),
    ("kv_transfer_params", {}),
]

BAD_CHAT: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", "Hi"),
    ("messages", [{"role": "user", "content": "x" * 300}]),
    ("messages[0]", [{"role": "user"}]),
    ("messages[0].role", [{"role": "<|eos|>", "content": "a"}]),
    ("messages[0].role", [{"role": "function", "content": "a"}]),
    ("messages[0].content", [{"role": "assistant", "tool_calls": []}]),
    (
        "messages[0].tool_calls",
        [
            {
                "role": "user",
                "content": "a",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            }
        ],
    ),
    ("messages[0].content", [{"role": "user", "content": 3}]),
    (
        "messages[0].content[0].type",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    ),
    ("messages[0].tool_calls", [{"role": "assistant", "content": "a", "tool_calls": [{}]}]),
    ("max_tokens", 0),
    ("max_completion_tokens", 0),
    ("top_logprobs", 3),
    ("logprobs", 3),
    ("tools", [{"type": "function", "function": {"name": "a b"}}]),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2),
    ("tools", [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]),
    ("tools", [{"type": "custom", "custom": {"name": "f"}}]),
    ("tools", [{"type": "function"}]),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("tool_choice", "maybe"),
    ("functions", [{}]),
    ("reasoning_effort", "high"),
    ("modalities", ["audio"]),
    ("chat_template", "{{ 1 }}"),
    ("documents", [{}]),
    ("echo", True),
    ("chat_template_kwargs", {"tools": 1}),
    ("chat_template_kwargs", {f"k{i}": 1 for i in range(17)}),
    ("chat_template_kwargs.x", {"x": [1]}),
]


def brief(value: Any) -> str:
    return str(value)[:40]


@pytest.mark.parametrize(("field", "value"), BAD_COMPLETIONS, ids=brief)
async def test_a_bad_completion_field_is_a_400_naming_it(
    connect: Callable[..., Any], field: str, value: Any
) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        reply = await client.post(COMPLETIONS, json={"prompt": "a", field: value})
    error = error_of(reply, 400)
    assert error["param"].partition("[")[0].partition(".")[0] == field, error
    assert error["message"].startswith(field)
    assert error["type"] == "BadRequestError"
    assert not engine.submitted


@pytest.mark.parametrize(("path", "value"), BAD_CHAT, ids=brief)
async def test_a_bad_chat_field_is_a_400_naming_it(
    connect: Callable[..., Any], path: str, value: Any
) -> None:
    field = path.partition("[")[0].partition(".")[0]
    engine = FakeEngine()
    async with connect(engine) as client:
        reply = await client.post(CHAT, json={"messages": USER, field: value})
    error = error_of(reply, 400)
    assert error["param"].startswith(path.partition(".x")[0]), error
    assert not engine.submitted


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "n": 2, "temperature": 0}, "n"),
        ({"prompt": "a", "min_tokens": 3, "max_tokens": 2}, "min_tokens"),
        ({"prompt": "a", "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"prompt": "a", "allowed_token_ids": [65], "bad_words": ["A"]}, "allowed_token_ids"),
        ({"prompt": "a", "logprobs": 30, "echo": True}, "logprobs"),
        ({"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"prompt": "a", "guided_regex": "a", "min_tokens": 1}, "min_tokens"),
        ({"prompt": "a", "guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"prompt": "a", "guided_regex": "a", "bad_words": ["x"]}, "bad_words"),
        ({"prompt": "a", "guided_regex": "a", "allowed_token_ids": [97]}, "allowed_token_ids"),
        ({}, "prompt"),
    ],
)
async def test_fields_that_contradict_each_other(
    connect: Callable[..., Any], body: dict[str, Any], param: str
) -> None:
    async with connect(FakeEngine()) as client:
        error = error_of(await client.post(COMPLETIONS, json=body), 400)
    assert error["param"] == param


async def test_a_prompt_that_does_not_fit_is_told_the_numbers(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        reply = await client.post(CHAT, json={"messages": USER, "max_completion_tokens": 240})
    error = error_of(reply, 400)
    assert error["code"] == "context_length_exceeded"
    assert all(number in error["message"] for number in ("20", "240", "256"))


async def test_continuing_and_prompting_exclude_each_other(connect: Callable[..., Any]) -> None:
    body = {"messages": USER, "continue_final_message": True, "add_generation_prompt": True}
    async with connect(FakeEngine()) as client:
        error = error_of(await client.post(CHAT, json=body), 400)
    assert error["param"] == "continue_final_message"


@pytest.mark.parametrize(
    "extra",
    [
        {"foo": 1, "metadata": {"a": "b"}},
        {"logprobs": None, "stop": None, "seed": None, "n": None, "stream_options": None},
        {"best_of": 2, "n": 2},
        {"suffix": "", "use_beam_search": False, "length_penalty": 1.0, "logprob_token_ids": []},
        {"response_format": {"type": "text"}, "structured_outputs": None},
        {"spaces_between_special_tokens": False, "user": "me", "request_id": "r-1"},
        {"temperature": 1, "top_p": 1, "top_k": -1},
    ],
    ids=str,
)
async def test_what_nobody_knows_or_asks_for_nothing_is_accepted(
    connect: Callable[..., Any], extra: dict[str, Any]
) -> None:
    async with connect(FakeEngine()) as client:
        reply = await client.post(COMPLETIONS, json={"prompt": "a", **extra})
    assert reply.status_code == 200, reply.text


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


async def test_errors_do_not_grow_with_what_was_sent(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        for body in (
            {"prompt": "a", "model": HUGE},
            {"prompt": "a", "truncation_side": HUGE},
            {"prompt": "a", "logit_bias": {HUGE: 1}},
            {"prompt": [HUGE] * 10},
        ):
            reply = await client.post(COMPLETIONS, json=body)
            assert reply.status_code in (400, 404)
            assert len(reply.content) < 1000


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from([-1, 0, 1, 258, 259, 2**31, 2**63, 1e308, -0.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
CHAT_FIELDS = sorted(
    {path.partition("[")[0].partition(".")[0] for path, _ in BAD_CHAT}
    | {"input", "instructions", "text", "metadata", "store", "truncation", "prompt", "tokens"}
)
STRUCTURED = ("response_format", "structured_outputs", "guided")
FIELDS = sorted(
    {field for field, _ in BAD_COMPLETIONS if not field.startswith(STRUCTURED)}
    | {"echo", "ignore_eos", "return_token_ids"}
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4),
    chat=st.dictionaries(st.sampled_from(CHAT_FIELDS), json_values, max_size=4),
)
async def test_no_body_is_a_server_error_or_leaves_something_running(
    connect: Callable[..., Any], body: dict[str, Any], chat: dict[str, Any]
) -> None:
    engine = FakeEngine("ab")
    async with connect(engine) as client:
        for path, asked in (
            (COMPLETIONS, {"prompt": "a", **body}),
            (CHAT, {"messages": USER, **chat}),
            ("/v1/responses", {"input": "a", **chat}),
            ("/tokenize", {"prompt": "a", **chat}),
            ("/detokenize", {"tokens": [1], **body}),
        ):
            reply = await client.post(path, json=asked)
            assert reply.status_code in (200, 400), (path, reply.text)
    assert engine.live == 0
