"""The routes that generate nothing: models, health, figures, tokenising.

Knows nothing of generation.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from .bodies import read_body
from .errors import ApiError, bad_request, draining, engine_dead
from .objects import (
    CountedTokens,
    DetokenizeReply,
    ModelCard,
    ModelList,
    TokenizeReply,
    TokensText,
)
from .openapi import described
from .protocol import DetokenizeRequest, TokenizeRequest
from .tools import ToolUse, check_tools

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .service import Service

Handler = TypeVar("Handler", bound="Callable[..., Awaitable[Response]]")


def add_info_routes(app: FastAPI, service: Service) -> None:
    """Models, health, version, metrics, load."""
    version = importlib.metadata.version("convserve")

    @_get(app, "/v1/models", ModelList)
    async def models() -> Response:
        """The names the model is served under."""
        return _json(
            ModelList(data=[_card(service, name) for name in service.settings.model_names])
        )

    @_get(app, "/v1/models/{name:path}", ModelCard)
    async def model(name: str) -> Response:
        """One of them."""
        service.check_model(name)
        return _json(_card(service, name))

    @_get(app, "/health", None)
    @_get(app, "/ping", None)
    async def health() -> Response:
        """200 while the engine runs and has been heard of lately, else 503."""
        if not service.client.is_alive:
            raise engine_dead()
        if not service.lifecycle.is_live:
            raise ApiError(503, "the engine has not been heard of for too long")
        return Response(status_code=200)

    @_get(app, "/ready", None)
    async def ready() -> Response:
        """200 while new work is taken, else 503."""
        if service.lifecycle.is_draining:
            raise draining()
        return await health()

    @app.post("/reset_prefix_cache", **described(None, None))
    async def reset_prefix_cache() -> Response:
        """Forgets every cached prompt prefix that no running request uses."""
        if not service.client.is_alive:
            raise engine_dead()
        service.client.reset_prefix_cache()
        return Response(status_code=200)

    @_get(app, "/version", None, "application/json")
    async def version_() -> Response:
        """The version of this server."""
        return _json({"version": version})

    @_get(app, "/load", None, "application/json")
    async def load() -> Response:
        """Sequences in the server."""
        return _json({"server_load": service.lifecycle.live})

    @_get(app, "/metrics", None, "text/plain")
    async def metrics(request: Request) -> Response:
        """Figures for Prometheus."""
        body, content_type = service.metrics.render_for(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})


def add_text_routes(app: FastAPI, service: Service) -> None:
    """Tokenising and its inverse."""

    @app.post("/tokenize", **described(TokenizeRequest, TokenizeReply))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation through the chat template."""
        fields = await read_body(request, TokenizeRequest, service.settings)
        token_ids = await _token_ids(service, fields)
        text_of = service.tokenizer.token_text
        return _json(
            TokenizeReply(
                tokens=token_ids,
                count=len(token_ids),
                max_model_len=service.info.max_model_len,
                token_strs=list(map(text_of, token_ids)) if fields.return_token_strs else None,
            )
        )

    @app.post("/detokenize", **described(DetokenizeRequest, DetokenizeReply))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        return _json(DetokenizeReply(await _text(service, request)))

    @app.post("/v1/tokenize", **described(TokenizeRequest, CountedTokens))
    async def counted_tokenize(request: Request) -> Response:
        """The same as /tokenize, in the form of SGLang's gateway."""
        fields = await read_body(request, TokenizeRequest, service.settings)
        token_ids = await _token_ids(service, fields)
        text = service.tokenizer.decode(token_ids) if fields.prompt is None else fields.prompt
        return _json(CountedTokens(token_ids, len(token_ids), len(text)))

    @app.post("/v1/detokenize", **described(DetokenizeRequest, TokensText))
    async def counted_detokenize(request: Request) -> Response:
        """The same as /detokenize, in the form of SGLang's gateway."""
        return _json(TokensText(await _text(service, request)))


async def _token_ids(service: Service, fields: TokenizeRequest) -> list[int]:
    service.check_model(fields.model)
    if fields.messages is None and fields.prompt is not None:
        return await service.prompts.text(
            fields.prompt, add_special_tokens=fields.add_special_tokens is not False
        )
    if fields.messages is None or fields.prompt is not None:
        raise bad_request("prompt", "either prompt or messages must be given")
    tools = check_tools(fields.tools)
    functions = tuple(tool.function for tool in tools)
    return await service.prompts.messages(
        fields.messages,
        fields.add_generation_prompt,
        continue_final_message=fields.continue_final_message,
        tools=ToolUse(tools, False, functions, True) if tools else None,
        add_special_tokens=bool(fields.add_special_tokens),
    )


async def _text(service: Service, request: Request) -> str:
    fields = await read_body(request, DetokenizeRequest, service.settings)
    service.check_model(fields.model)
    service.prompts.check_tokens(fields.tokens)
    return service.tokenizer.decode(fields.tokens)


def _get(
    app: FastAPI,
    path: str,
    reply: type[msgspec.Struct] | None,
    media_type: str | None = None,
) -> Callable[[Handler], Handler]:
    """Registers a handler for GET, and for HEAD, which some clients probe with."""

    def register(handler: Handler) -> Handler:
        app.add_api_route(
            path, handler, methods=["GET"], **described(None, reply, media_type=media_type)
        )
        app.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)
        return handler

    return register


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        created=service.created,
        root=service.model,
        max_model_len=service.info.max_model_len,
    )


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
