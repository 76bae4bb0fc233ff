"""The OpenAPI description, from the same structs that read and write bodies.

Knows nothing of what routes do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from fastapi.openapi.utils import get_openapi

from . import errors, protocol

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
_STRUCTS = (
    errors.ErrorReply,
    protocol.ChatChunk,
    protocol.ChatReply,
    protocol.ChatRequest,
    protocol.CompletionReply,
    protocol.CompletionRequest,
    protocol.DetokenizeReply,
    protocol.DetokenizeRequest,
    protocol.ModelCard,
    protocol.ModelList,
    protocol.TokenizeReply,
    protocol.TokenizeRequest,
)


def described(
    request: type[msgspec.Struct] | None,
    reply: type[msgspec.Struct] | None,
    *,
    stream: bool = False,
) -> dict[str, Any]:
    """Arguments of a route: the schemas of its body and of its replies."""
    content: dict[str, Any] = {}
    if reply is not None:
        content["application/json"] = {"schema": _ref(reply)}
    if stream:
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": "Chunks as `data:` events, then [DONE]."}
        }
    success: dict[str, Any] = {"description": "Success."}
    if content:
        success["content"] = content
    error = {"application/json": {"schema": _ref(errors.ErrorReply)}}
    skipped = () if request is not None else (400, 408, 413, 415, 429)
    described: dict[str, Any] = {
        "responses": {200: success}
        | {
            status: {"description": text, "content": error}
            for status, text in _ERRORS.items()
            if status not in skipped
        }
    }
    if request is not None:
        described["openapi_extra"] = {
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": _ref(request)}},
            }
        }
    return described


def describe(app: FastAPI) -> dict[str, Any]:
    """The whole description of `app`."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        _, components = msgspec.json.schema_components(_STRUCTS, ref_template=_REF)
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


def _ref(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}
