"""Tools of a chat request: which may be called, how a call is written, and what forces one.

Knows nothing of templates or of replies. A call is JSON with `name` and `arguments` between
`<tool_call>` and `</tool_call>`. Templates that know tools have taught their models to write one
such block per call (the form of Hermes, Qwen and others). A model whose template does not is told
in a system message, in the form that SmolLM2 was taught: one block with a list of calls.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ..engine.messages import JSON_WHITESPACE, Grammar
from .errors import bad_request
from .protocol import NamedTool
from .settings import MAX_TOOLS
from .structured import Structure, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .protocol import ChatRequest, Tool, ToolFunction

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_CALLS = 16
"""Calls in one answer where calls are forced."""
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ToolUse(NamedTuple):
    """The tools that an answer may or must use."""

    tools: tuple[Tool, ...]
    is_forced: bool
    """The answer is calls and nothing else."""
    callable: tuple[ToolFunction, ...]
    """What may be called: all of them, or the one that was named."""
    is_parallel: bool

    @property
    def names(self) -> frozenset[str]:
        """Names that may be called."""
        return frozenset(function.name for function in self.callable)


def tool_use(request: ChatRequest) -> ToolUse | None:
    """The tools of `request`, None if it offers none or wants none used; raises ApiError 400."""
    choice, tools = request.tool_choice, check_tools(request.tools)
    if not tools:
        if choice in ("none", "auto"):
            return None
        raise bad_request("tool_choice", "needs tools")
    if choice == "none":
        return None
    functions = tuple(tool.function for tool in tools)
    if isinstance(choice, NamedTool):
        named = tuple(f for f in functions if f.name == choice.function.name)
        if not named:
            raise bad_request("tool_choice", "names a function that is not among the tools")
        return ToolUse(tools, True, named, is_parallel=False)
    return ToolUse(tools, choice == "required", functions, request.parallel_tool_calls)


def check_tools(tools: Sequence[Tool]) -> tuple[Tool, ...]:
    """`tools`, in bounds and with names of their own; raises ApiError 400."""
    if len(tools) > MAX_TOOLS:
        raise bad_request("tools", f"{len(tools)} are too many (at most {MAX_TOOLS})")
    names: set[str] = set()
    for position, tool in enumerate(tools):
        name = tool.function.name
        if _NAME.fullmatch(name) is None:
            raise bad_request(
                f"tools[{position}].function.name", "must be 1 to 64 letters, digits or _ . -"
            )
        if name in names:
            raise bad_request(f"tools[{position}].function.name", "is there twice")
        names.add(name)
    return tuple(tools)


def call_structure(use: ToolUse, *, in_list: bool) -> Structure | None:
    """The grammar of an answer that must call, or whose calls must follow their schemas.

    `in_list`: calls are written as a list in one block.
    """
    strict = any(function.strict for function in use.callable)
    if not use.is_forced and not strict:
        return None
    more = f"{{0,{MAX_CALLS - 1}}}" if use.is_parallel else ""
    if in_list:
        others = f'(", " call){more}' if more else ""
        block = f'"[" call {others} "]" {quoted(CLOSE)}'
    else:
        block = f'"\\n" call "\\n" {quoted(CLOSE)}'
    lines = ["%llguidance {}"]
    if not use.is_forced:
        lines += [
            "start: free* TEXT",
            f"free: open {block}",
            f"open[lazy]: TEXT {quoted(OPEN)}",
            r"TEXT: /(.|\n)*/",
        ]
    else:
        repeats = more and not in_list
        lines += [
            'start: block ("\\n" block)' + more if repeats else "start: block",
            f"block: {quoted(OPEN)} {block}",
        ]
    lines += ["call: " + " | ".join(f"call_{i}" for i in range(len(use.callable)))]
    lines += [
        f"call_{i}: {_call(function, is_free=not (use.is_forced or function.strict))}"
        for i, function in enumerate(use.callable)
    ]
    return Structure(Grammar("lark", "\n".join(lines)), "tools")


def _call(function: ToolFunction, *, is_free: bool) -> str:
    """One call in Lark. Its schema stands alone, so that its references stay its own."""
    schema: dict[str, Any] = {"type": "object"}
    if not is_free:
        schema = dict(_NO_ARGUMENTS if function.parameters is None else function.parameters)
    schema["x-guidance"] = {"whitespace_pattern": JSON_WHITESPACE}
    head = f'{{"name": {json.dumps(function.name)}, "arguments": '
    return f'{quoted(head)} %json {json.dumps(schema)} "}}"'


def as_told(tool: Tool) -> dict[str, Any]:
    """A tool as a template or a model reads it."""
    given = {
        name: value
        for name, value in msgspec.to_builtins(tool.function).items()
        if value is not None and name != "strict"
    }
    return {"type": tool.type, "function": given}


def instructions(use: ToolUse) -> str:
    """A system message for a model whose template does not know tools."""
    functions = [told["function"] for told in map(as_told, use.tools)]
    listed = json.dumps(functions, ensure_ascii=False)
    many = "one or more of them" if use.is_parallel else "one of them"
    return (
        "You have access to the following tools:\n"
        f"<tools>{listed}</tools>\n\n"
        f"If the question needs {many}, answer with nothing but the calls, in this form:\n"
        f'{OPEN}[{{"name": "function", "arguments": {{"parameter": "value"}}}}]{CLOSE}'
    )


def told_as_text(turns: Sequence[dict[str, Any]], use: ToolUse | None) -> list[dict[str, Any]]:
    """`turns` for a template that knows no tools: calls and their answers become text, and the
    tools are told in the system message."""
    told: list[dict[str, Any]] = []
    for turn in turns:
        if turn["role"] == "tool":
            answer = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if told and told[-1]["role"] == "tool":
                told[-1]["content"] += "\n" + answer
            else:
                told.append({"role": "tool", "content": answer})
        elif "tool_calls" in turn:
            calls = [call["function"] for call in turn["tool_calls"]]
            written = f"{OPEN}{json.dumps(calls, ensure_ascii=False)}{CLOSE}"
            content = "\n".join([part for part in (turn["content"], written) if part])
            told.append({"role": "assistant", "content": content})
        else:
            told.append(dict(turn))
    for turn in told:
        if turn["role"] == "tool":  # many templates know no such role
            turn["role"] = "user"
    if use is not None:
        text = instructions(use)
        if told and told[0]["role"] == "system":
            told[0]["content"] += "\n\n" + text
        else:
            told.insert(0, {"role": "system", "content": text})
    return told
