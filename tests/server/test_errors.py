"""Fields that are wrong: each is a 400 that names it, whatever else was sent.

Breaks for: clients that act on statuses, and everybody beside a request that got through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from error_reply import error_of
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]


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
