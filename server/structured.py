"""What a request says its output must be, as a grammar for the engine.

Knows nothing of how grammars are compiled. OpenAI's `response_format`, vLLM's `structured_outputs`
and its older `guided_*` fields say the same; a request uses one of them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from ..engine.messages import Grammar
from .errors import bad_request
from .protocol import StructuredOutputs
from .settings import MAX_OUTPUT_CHOICES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .protocol import GenerationFields, JsonSchema, ResponseFormat

_ANY_OBJECT: JsonSchema = {"type": "object"}


class Structure(NamedTuple):
    """A grammar, and the request's field that asked for it."""

    grammar: Grammar
    field: str


def structure_of(request: GenerationFields) -> Structure | None:
    """What `request` asks of its output, if anything; raises ApiError 400."""
    found: list[Structure] = []
    if request.response_format is not None:
        asked = _of_format(request.response_format)
        if asked is not None:
            found.append(Structure(asked, "response_format"))
    options = request.structured_outputs
    if options is not None and options.json_object:
        found.append(Structure(_schema(_ANY_OBJECT), "structured_outputs.json_object"))
    if options is not None:
        found += _asked("structured_outputs.", options)
    older = StructuredOutputs(
        json=request.guided_json,
        regex=request.guided_regex,
        choice=request.guided_choice,
        grammar=request.guided_grammar,
    )
    found += _asked("guided_", older)
    if len(found) > 1:
        raise bad_request(found[1].field, f"cannot be combined with {found[0].field}")
    return found[0] if found else None


def _asked(prefix: str, options: StructuredOutputs) -> Iterator[Structure]:
    if options.json is not None:
        yield Structure(_schema(options.json), f"{prefix}json")
    if options.regex is not None:
        yield Structure(Grammar("regex", options.regex), f"{prefix}regex")
    if options.choice is not None:
        yield Structure(_one_of(options.choice, f"{prefix}choice"), f"{prefix}choice")
    if options.grammar is not None:
        yield Structure(_grammar(options.grammar), f"{prefix}grammar")


def _of_format(asked: ResponseFormat) -> Grammar | None:
    if asked.type == "json_schema":
        if asked.json_schema is None:
            raise bad_request("response_format.json_schema", "is missing")
        return _schema(asked.json_schema.schema)
    return _schema(_ANY_OBJECT) if asked.type == "json_object" else None


def _schema(schema: JsonSchema | str) -> Grammar:
    return Grammar("json_schema", schema if isinstance(schema, str) else json.dumps(schema))


def _one_of(choices: list[str], field: str) -> Grammar:
    if not 0 < len(choices) <= MAX_OUTPUT_CHOICES or "" in choices:
        raise bad_request(field, f"must be 1 to {MAX_OUTPUT_CHOICES} texts, none of them empty")
    return Grammar("lark", "start: " + " | ".join(map(quoted, choices)))


def _grammar(source: str) -> Grammar:
    return Grammar("gbnf" if "::=" in source else "lark", source)


def quoted(text: str) -> str:
    """`text` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
