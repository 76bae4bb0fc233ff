"""Reading a JSON body into one of the request structs.

Strict about types (a string is never a number), drops nulls, ignores fields nobody knows and
refuses by name those that OpenAI's or vLLM's API has and this server does not act on. Knows nothing
of what fields do.
"""

from __future__ import annotations

import json
import math
from typing import Any, TypeVar

import msgspec

from .errors import ApiError, bad_request
from .protocol import ChatRequest, CompletionRequest
from .responses_protocol import ResponsesRequest

T = TypeVar("T", bound=msgspec.Struct)
Refused = dict[str, tuple[object, ...]]
"""Known fields that are not acted on, and the values (besides null) that ask for nothing."""

_GENERATION: Refused = {
    "audio": (),
    "early_stopping": (False,),
    "guided_decoding_backend": ("auto",),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "stream_interval": (1,),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
}
_CHAT: Refused = _GENERATION | {
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": ("none",),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_RESPONSES: Refused = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
}
_FIELDS: dict[type[msgspec.Struct], Refused] = {
    CompletionRequest: _GENERATION | {"suffix": ("",)},
    ChatRequest: _CHAT,
    ResponsesRequest: _RESPONSES,
}
_MESSAGE: Refused = {"audio": (), "function_call": (), "refusal": ()}
_STRUCTURED: Refused = {
    "disable_additional_properties": (False,),
    "disable_any_whitespace": (False,),
    "structural_tag": (),
    "whitespace_pattern": (),
}


def parse(body: bytes, kind: type[T]) -> T:
    """Reads a JSON body as `kind`; raises ApiError 400 naming the field at fault."""
    try:
        fields = msgspec.json.decode(body)
    except RecursionError:
        raise bad_request(None, "the body is nested too deeply") from None
    except msgspec.ValidationError:  # JSON, but with a number that nothing can hold
        raise bad_request(_unbounded(body), "has a number that is out of range") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(None, f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad_request(None, "the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    _refuse(fields, _FIELDS.get(kind, {}), "")
    if "best_of" in fields and fields["best_of"] != fields.get("n", 1):
        raise bad_request("best_of", "is not supported unless equal to n")
    messages = fields.get("messages")
    for position, message in enumerate(messages if isinstance(messages, list) else ()):
        _refuse(message, _MESSAGE, f"messages[{position}].")
    _refuse(fields.get("structured_outputs"), _STRUCTURED, "structured_outputs.")
    try:
        return msgspec.convert(fields, kind)
    except RecursionError:
        raise bad_request(None, "the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None


def _refuse(fields: Any, table: Refused, where: str) -> None:
    if not isinstance(fields, dict):
        return
    for name in fields.keys() & table.keys():
        if fields[name] is not None and fields[name] not in table[name]:
            raise bad_request(where + name, "is not supported by this server")


def _field_error(message: str) -> ApiError:
    """msgspec's "what - at `$.field[...]`" as "field: what"."""
    what, separator, path = message.rpartition(" - at `$")
    if not separator:
        missing = message.partition("required field `")[2].rstrip("`")
        return bad_request(missing or None, "is missing" if missing else message)
    return bad_request(path.rstrip("`").lstrip(".") or None, what)


class _OutOfRange:
    """Stands for a number that nothing can hold."""


def _unbounded(body: bytes) -> str | None:
    """The top-level field of `body` that has such a number."""

    def real(text: str) -> object:
        return _OutOfRange() if math.isinf(float(text)) else 0

    def integer(text: str) -> object:
        return _OutOfRange() if len(text) > 4000 else 0

    try:
        fields = json.loads(body, parse_float=real, parse_int=integer)
    except (RecursionError, ValueError):
        return None
    found = [name for name, value in fields.items() if _has_unbounded(value)]
    return found[0][:80] if found else None


def _has_unbounded(value: object) -> bool:
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _OutOfRange):
            return True
        waiting += value.values() if isinstance(value, dict) else ()
        waiting += value if isinstance(value, list) else ()
    return False
