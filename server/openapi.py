"""The OpenAPI description, from the same structs that read and write bodies.

Knows nothing of what routes do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.openapi.utils import get_openapi
from starlette.responses import Response

from . import errors, objects, protocol, responses_protocol
from .bounds import BOUNDS
from .examples import EXAMPLES

if TYPE_CHECKING:
    from fastapi import FastAPI

_REF = "#/components/schemas/{name}"
_ERRORS = {
    400: "A field is wrong; `param` names it.",
    401: "No valid API key.",
    404: "No such model.",
    408: "Too slow.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests wait; see Retry-After.",
    431: "The headers are too large.",
    500: "Internal error.",
    503: "Shutting down, or the engine is gone; see Retry-After.",
}
_NUMBER, _STRING, _ARRAY, _OBJECT = ("integer", "number"), ("string",), ("array",), ("object",)
_APPLIES = {
    "minimum": _NUMBER,
    "maximum": _NUMBER,
    "exclusiveMinimum": _NUMBER,
    "minLength": _STRING,
    "maxLength": _STRING,
    "pattern": _STRING,
    "minItems": _ARRAY,
    "maxItems": _ARRAY,
    "items": _ARRAY,
    "maxProperties": _OBJECT,
    "propertyNames": _OBJECT,
    "additionalProperties": _OBJECT,
}
"""Types that a keyword of JSON Schema says something about."""
_STRUCTS = (
    errors.ErrorReply,
    objects.ChatChunk,
    objects.ChatReply,
    protocol.ChatRequest,
    objects.CompletionReply,
    protocol.CompletionRequest,
    objects.CountedTokens,
    objects.DetokenizeReply,
    protocol.DetokenizeRequest,
    objects.ModelCard,
    objects.ModelList,
    objects.TokenizeReply,
    protocol.TokenizeRequest,
    objects.TokensText,
    responses_protocol.ResponsesEvent,
    responses_protocol.ResponsesReply,
    responses_protocol.ResponsesRequest,
)


def described(
    request: type[msgspec.Struct] | None,
    reply: type[msgspec.Struct] | None,
    *,
    event: type[msgspec.Struct] | None = None,
    media_type: str | None = None,
) -> dict[str, Any]:
    """Arguments of a route: the schemas of its body and of its replies.

    Args:
        event: what `data` of a stream's events is, where the route can stream.
        media_type: of a reply that no struct describes; None where it is empty.
    """
    content: dict[str, Any] = {}
    if reply is not None:
        content["application/json"] = {"schema": _ref(reply)}
    elif media_type is not None:
        content[media_type] = {}
    if event is not None:
        content["text/event-stream"] = {"schema": _event_schema(event)}
    success: dict[str, Any] = {"description": "Success."}
    if content:
        success["content"] = content
    error = {"application/json": {"schema": _ref(errors.ErrorReply)}}
    skipped = () if request is not None else (400, 408, 413, 415, 429)
    described: dict[str, Any] = {
        "response_class": Response,  # FastAPI's own has JSON of no schema
        "responses": {200: success}
        | {
            status: {"description": text, "content": error}
            for status, text in _ERRORS.items()
            if status not in skipped
        },
    }
    if request is not None:
        examples = {name: {"value": body} for name, body in EXAMPLES[request].items()}
        body = {"application/json": {"schema": _ref(request), "examples": examples}}
        described["openapi_extra"] = {"requestBody": {"required": True, "content": body}}
    return described


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole description of `app`."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, components = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)
        for struct in EXAMPLES:
            _finish(components[struct.__name__], BOUNDS.get(struct, {}))
        schema["components"] = {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        }
        schema["security"] = [{"key": []}, {}]
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own; bodies are read by hand
        app.openapi_schema = schema
    return app.openapi_schema


def _finish(component: dict[str, Any], bounds: dict[str, dict[str, Any]]) -> None:
    """Adds to a request's schema what its struct does not say: bounds, and that null is absent."""
    required = component.get("required", ())
    for name, field in component["properties"].items():
        kinds: list[dict[str, Any]] = field.get("anyOf", [field])
        for kind in kinds:
            for keyword, bound in bounds.get(name, {}).items():
                if kind.get("type") in _APPLIES[keyword]:
                    kind[keyword] = bound
        if name not in required and not any(kind.get("type") == "null" for kind in kinds):
            rest = {key: field.pop(key) for key in ("description", "default") if key in field}
            kinds = field["anyOf"] if "anyOf" in field else [dict(field)]
            field.clear()
            field.update({"anyOf": [*kinds, {"type": "null"}], **rest})


def _event_schema(data: type[msgspec.Struct]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "event": {"type": "string"},
            "data": {
                "anyOf": [
                    {
                        "type": "string",
                        "contentMediaType": "application/json",
                        "contentSchema": {"anyOf": [_ref(data), _ref(errors.ErrorReply)]},
                    },
                    {"const": "[DONE]"},
                ]
            },
        },
        "required": ["data"],
    }


def _ref(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}
