"""Tools: what the model is told, what it is held to, and its calls as clients read them.

Breaks for: agents, whose next step is whatever a call says.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import events
from convserve.engine.grammar import compiled, vocabulary
from convserve.engine.messages import Grammar
from convserve.engine.text import TextTokenizer
from convserve.server.tool_text import CallPiece, ToolText
from convserve.server.tools import MAX_CALLS
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PATH = "/v1/chat/completions"
FOLDER = Path(__file__).parents[1] / "data" / "tokenizer"
TOKENIZER = TextTokenizer.from_folder(FOLDER)
USER = [{"role": "user", "content": "Hi"}]
SHORT = {"messages": USER, "truncate_prompt_tokens": 120}
"""Bytes are tokens here, and the scripted engine's context holds 256."""


def tool(name: str, strict: bool | None = None, **properties: str) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "description": f"Does {name}.", "parameters": schema}
    return {"type": "function", "function": function | ({"strict": strict} if strict else {})}


TOOLS = [tool("f", a="integer"), tool("g", b="boolean")]
F = '{"name": "f", "arguments": {"a": 1}}'
G = '{"name": "g", "arguments": {"b": true}}'


async def post(client: Any, **body: Any) -> Any:
    reply = await client.post(PATH, json={**SHORT, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def stream(client: Any, **body: Any) -> list[Any]:
    reply = await client.post(PATH, json={**SHORT, "stream": True, **body})
    assert reply.status_code == 200, reply.text
    found = events(reply.content)
    assert found.pop() == "[DONE]"
    return [chunk["choices"][0] for chunk in found]


def said(engine: FakeEngine) -> str:
    return TOKENIZER.decode(engine.submitted[-1].prompt)


async def test_a_call_is_a_call_and_no_text(connect: Callable[..., Any]) -> None:
    engine = FakeEngine(f"<tool_call>\n{F}\n</tool_call>")
    async with connect(engine) as client:
        [choice] = (await post(client, tools=TOOLS))["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    [call] = choice["message"]["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert engine.submitted[0].params.grammar is None


@pytest.mark.parametrize(
    "text",
    [
        f"Let me see.\n<tool_call>[{F}, {G}]</tool_call>",
        f"Let me see.\n\n<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>\n",
    ],
)
async def test_a_stream_of_calls_adds_up_to_the_whole_reply(
    connect: Callable[..., Any], text: str
) -> None:
    for per_step in (1, 3, 1000):
        async with connect(FakeEngine(text, tokens_per_step=per_step)) as client:
            [whole] = (await post(client, tools=TOOLS, logprobs=True))["choices"]
            parts = await stream(client, tools=TOOLS, logprobs=True)
        content, calls, tokens = "", {}, []
        for part in parts:
            content += part["delta"].get("content", "")
            tokens += (part["logprobs"] or {"content": []})["content"]
            for new in part["delta"].get("tool_calls", ()):
                if "id" in new:
                    assert new["index"] == len(calls)
                    calls[new["index"]] = {"name": new["function"]["name"], "arguments": ""}
                calls[new["index"]]["arguments"] += new["function"]["arguments"]
        told = [call["function"] for call in whole["message"]["tool_calls"]]
        assert [calls[0], calls[1]] == told
        assert told == [
            {"name": "f", "arguments": '{"a": 1}'},
            {"name": "g", "arguments": '{"b": true}'},
        ]
        assert content == whole["message"]["content"] == "Let me see."
        assert tokens == whole["logprobs"]["content"]
        assert parts[-1]["finish_reason"] == whole["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no call at all ", "no call at all "),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None),
        ("<tool_call>oops</tool_call>", None),
        ('<tool_call>{"name": ["f"]}</tool_call>', None),
        ('see <tool_call>{"name": "f", ', None),
        ("a <tool_cal", None),
        ("<tool_call>[]</tool_call>", ""),
    ],
)
async def test_what_is_no_call_stays_text(
    connect: Callable[..., Any], text: str, content: str | None
) -> None:
    async with connect(FakeEngine(text)) as client:
        [choice] = (await post(client, tools=TOOLS))["choices"]
        parts = await stream(client, tools=TOOLS)
    expected = text if content is None else content
    assert choice["message"] == {"role": "assistant", "content": expected}
    assert "".join(part["delta"].get("content", "") for part in parts) == expected
    assert choice["finish_reason"] == parts[-1]["finish_reason"] == "stop"


async def test_without_tools_or_with_choice_none_tags_are_text(
    connect: Callable[..., Any],
) -> None:
    text = f"<tool_call>{F}</tool_call>"
    engine = FakeEngine(text)
    async with connect(engine) as client:
        for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            [choice] = (await post(client, **body))["choices"]
            assert choice["message"]["content"] == text
            assert said(engine) == "user: Hi\nassistant: "


async def test_one_call_is_all_there_is_without_parallel_calls(
    connect: Callable[..., Any],
) -> None:
    async with connect(FakeEngine(f"<tool_call>[{F}, {G}]</tool_call> and more")) as client:
        [choice] = (await post(client, tools=TOOLS, parallel_tool_calls=False))["choices"]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["f"]
    assert choice["message"]["content"] is None


async def test_an_answer_cut_by_length_says_so(connect: Callable[..., Any]) -> None:
    text = f"<tool_call>\n{F}"
    async with connect(FakeEngine(text)) as client:
        body = {"tools": TOOLS, "max_tokens": len(text) - 3}
        [choice] = (await post(client, **body))["choices"]
        parts = await stream(client, **body)
    assert choice["finish_reason"] == parts[-1]["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": '


async def test_a_template_without_tools_is_told_in_words(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    turns = [
        {"role": "system", "content": "Be nice."},
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "two"}]},
    ]
    small = [{"type": "function", "function": {"name": "f"}}]
    async with connect(engine, folder=FOLDER) as client:
        await post(client, messages=turns, tools=small, max_tokens=1, truncate_prompt_tokens=-1)
    told = said(engine)
    assert told.endswith(
        'assistant: <tool_call>[{"name": "f", "arguments": {"a": 1}}]</tool_call>\n'
        "user: <tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response>\n"
        "assistant: "
    )


async def test_a_template_with_tools_gets_them_and_users_make_no_special_tokens(
    connect: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for t in tools or [] %}{{ t.function.name }}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}<|bos|>{{ m.role }}|{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}"
    )
    engine = FakeEngine()
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": "<|eos|>"}'}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
    function = {"name": "f", "description": "<|eos|>"}
    async with connect(engine, folder=tmp_path) as client:
        await post(
            client,
            messages=turns,
            tools=[{"type": "function", "function": function}],
            truncate_prompt_tokens=200,
            max_tokens=1,
        )
    prompt = engine.submitted[0].prompt
    assert [token for token in prompt if token >= 256] == [256, 256]
    told = '{"type": "function", "function": {"name": "f", "description": "<|eos|>"}}'
    assert said(engine) == f"f{told}<|bos|>assistant|<|eos|><|bos|>tool|x"


BYTES = vocabulary(
    [*(bytes([byte]) for byte in range(256)), b"<end>"], [256], [256], lambda t: [*t.encode()]
)


def allows(grammar: Grammar | None, text: str) -> bool:
    """Whether `text` is a whole output under `grammar`."""
    assert grammar is not None
    matcher = compiled(grammar, BYTES)
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


async def grammar_of(connect: Callable[..., Any], folder: Path = FOLDER, **body: Any) -> Any:
    engine = FakeEngine()
    async with connect(engine, folder=folder) as client:
        await post(client, max_tokens=1, truncate_prompt_tokens=-1, **body)
    return engine.submitted[0].params.grammar


async def test_required_calls_follow_their_schemas(connect: Callable[..., Any]) -> None:
    grammar = await grammar_of(connect, tools=TOOLS, tool_choice="required")
    assert allows(grammar, f"<tool_call>[{F}]</tool_call>")
    assert allows(grammar, "<tool_call>[" + ", ".join([F] * MAX_CALLS) + "]</tool_call>")
    assert not allows(grammar, "<tool_call>[" + ", ".join([F] * (MAX_CALLS + 1)) + "]</tool_call>")
    assert not allows(grammar, "I would rather not")
    assert not allows(grammar, "<tool_call>[]</tool_call>")
    assert not allows(grammar, f"<tool_call>[{F.replace('1', 'true')}]</tool_call>")
    alone = await grammar_of(
        connect, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    assert allows(alone, f"<tool_call>[{G}]</tool_call>")
    assert not allows(alone, f"<tool_call>[{F}, {G}]</tool_call>")


async def test_a_named_tool_is_the_one_that_is_called(connect: Callable[..., Any]) -> None:
    choice = {"type": "function", "function": {"name": "g"}}
    grammar = await grammar_of(connect, tools=TOOLS, tool_choice=choice)
    assert allows(grammar, f"<tool_call>[{G}]</tool_call>")
    assert not allows(grammar, f"<tool_call>[{F}]</tool_call>")


async def test_templates_that_know_tools_have_one_block_per_call(
    connect: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((FOLDER / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ tools | length }}{{ messages[0].content }}")
    body = {"tools": TOOLS, "tool_choice": "required"}
    grammar = await grammar_of(connect, tmp_path, **body)
    one, two = (f"<tool_call>\n{call}\n</tool_call>" for call in (F, G))
    assert allows(grammar, one)
    assert allows(grammar, f"{one}\n{two}")
    alone = await grammar_of(connect, tmp_path, **body, parallel_tool_calls=False)
    assert allows(alone, two)
    assert not allows(alone, f"{one}\n{two}")


async def test_strict_tools_hold_free_answers_to_their_schemas(
    connect: Callable[..., Any],
) -> None:
    tools = [tool("f", True, a="integer"), {"type": "function", "function": {"name": "g"}}]
    grammar = await grammar_of(connect, tools=tools)
    assert allows(grammar, "Only words.")
    assert allows(grammar, f"Words <tool_call>[{F}]</tool_call> and words.")
    assert allows(grammar, f"<tool_call>[{G}]</tool_call>")
    assert not allows(grammar, f"<tool_call>[{F.replace('1', 'true')}]</tool_call>")


async def test_a_function_without_parameters_takes_none(connect: Callable[..., Any]) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    grammar = await grammar_of(connect, tools=tools, tool_choice="required")
    assert allows(grammar, '<tool_call>[{"name": "f", "arguments": {}}]</tool_call>')
    assert not allows(grammar, f"<tool_call>[{F}]</tool_call>")


async def test_references_stay_inside_their_own_schema(connect: Callable[..., Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"n": {"type": "integer"}},
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}, TOOLS[1]]
    grammar = await grammar_of(connect, tools=tools, tool_choice="required")
    assert allows(grammar, f"<tool_call>[{F}]</tool_call>")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
        (
            {"tools": [tool("f", a="strin")], "tool_choice": "required"},
            "tools",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}},
            "tool_choice",
        ),
    ],
)
async def test_refusals_name_the_field(
    connect: Callable[..., Any], body: dict[str, Any], param: str
) -> None:
    engine = FakeEngine()
    async with connect(engine) as client:
        reply = await client.post(PATH, json={"messages": USER, **body})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert not engine.submitted


def read(parts: Iterable[str], is_parallel: bool) -> tuple[str, list[tuple[str, str]]]:
    reader = ToolText(frozenset({"f", "g"}), is_parallel=is_parallel)
    pieces = [piece for part in parts for piece in reader.push(part)] + reader.finish()
    text = "".join([piece for piece in pieces if isinstance(piece, str)])
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, CallPiece):
            if piece.name is not None:
                assert piece.call == len(calls)
                calls.append((piece.name, ""))
            name, arguments = calls[piece.call]
            calls[piece.call] = name, arguments + piece.arguments
    return text, calls


fragments = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool", F, G, '{"arguments": {"a": "}"}, "name": "f"}', " ",
     "\n", "[", "]", ", ", "{", "}", '"', "\\", "text", '{"name": "f", "arguments": "{}"}',
     '{"name": "f"}', '{"name": "f", "arguments": {"x": "</tool_call>"'],
)  # fmt: skip


@given(st.lists(fragments, max_size=8), st.lists(st.integers(0, 200), max_size=6), st.booleans())
def test_calls_do_not_depend_on_how_the_text_was_cut(
    parts: list[str], cuts: list[int], is_parallel: bool
) -> None:
    text = "".join(parts)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = read([text], is_parallel)
    assert read(pieces, is_parallel) == whole == read(text, is_parallel)
    if "<tool_call>" not in text:
        assert whole == (text, [])
    if not is_parallel:
        assert len(whole[1]) <= 1
