"""POST /v1/completions and /v1/chat/completions: validate, admit, generate, answer or stream.

Knows nothing of how text is made or of how replies are written.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import Response

from .bodies import read_body
from .errors import bad_request
from .generation import Generation, Work
from .middleware import clean_label, record_of
from .openapi import described
from .prefix_salt import cache_salt
from .protocol import ChatReply, ChatRequest, CompletionReply, CompletionRequest
from .replies import ChatReplies, CompletionReplies, ReplyHead
from .sampling import is_score_only, sampling_params, stop_strings
from .streaming import EventStream, WholeReply

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from ..engine.messages import SamplingParams
    from .middleware import RequestRecord
    from .prompts import Prompt
    from .service import Service

Fields = TypeVar("Fields", CompletionRequest, ChatRequest)

_MAX_PRIORITY = 2**31 - 1


def add_generation_routes(app: FastAPI, service: Service) -> None:
    """The two routes that generate text."""

    @app.post("/v1/completions", **described(CompletionRequest, CompletionReply, stream=True))
    async def completions(request: Request) -> Response:
        """Continues a prompt, or several."""
        fields, record = await _accept(service, request, CompletionRequest)
        params = sampling_params(fields, service.defaults, service.info, service.tokenizer)
        prompts = await service.prompts.completion(fields, params.max_tokens)
        generation = _generation(service, fields, params, prompts, record)
        head = _head(service, fields, f"cmpl-{record.request_id}")
        replies = CompletionReplies(fields, generation, service.tokenizer, head, prompts)
        return _answer(service, fields, generation, replies, record)

    @app.post("/v1/chat/completions", **described(ChatRequest, ChatReply, stream=True))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""
        fields, record = await _accept(service, request, ChatRequest)
        params = sampling_params(fields, service.defaults, service.info, service.tokenizer)
        prompt = await service.prompts.chat(fields, params.max_tokens)
        generation = _generation(service, fields, params, [prompt], record)
        head = _head(service, fields, f"chatcmpl-{record.request_id}")
        replies = ChatReplies(fields, generation, service.tokenizer, head, prompt)
        return _answer(service, fields, generation, replies, record)


async def _accept(
    service: Service, request: Request, kind: type[Fields]
) -> tuple[Fields, RequestRecord]:
    """The body, if the server takes work and serves the model it names; raises ApiError."""
    service.lifecycle.check(1, service.metrics)
    fields = await read_body(request, kind, service.settings)
    service.check_model(fields.model)
    if fields.stream_options is not None and not fields.stream:
        raise bad_request("stream_options", "needs stream to be true")
    if abs(fields.priority) > _MAX_PRIORITY:
        raise bad_request("priority", f"is out of range (-{_MAX_PRIORITY} to {_MAX_PRIORITY})")
    record = record_of(request.scope)
    record.user = clean_label(fields.user)
    if record.label is None:
        record.label = clean_label(fields.request_id)
    return fields, record


def _generation(
    service: Service,
    fields: CompletionRequest | ChatRequest,
    params: SamplingParams,
    prompts: Sequence[Prompt],
    record: RequestRecord,
) -> Generation:
    work = Work(
        request_id=record.request_id,
        prompts=prompts,
        params=params,
        stops=stop_strings(fields),
        include_stop=fields.include_stop_str_in_output,
        skip_special_tokens=fields.skip_special_tokens,
        score_only=is_score_only(fields),
        priority=fields.priority,
        cache_salt=cache_salt(fields.cache_salt, record.tenant),
    )
    most = service.lifecycle.capacity
    if work.num_choices > most:
        raise bad_request("n", f"{work.num_choices} choices over all prompts (at most {most})")
    generation = Generation(
        work, service.client, service.tokenizer, service.metrics, record.started
    )
    record.generation = generation
    return generation


def _head(service: Service, fields: CompletionRequest | ChatRequest, reply_id: str) -> ReplyHead:
    return ReplyHead(reply_id, int(time.time()), fields.model or service.model)


def _answer(
    service: Service,
    fields: CompletionRequest | ChatRequest,
    generation: Generation,
    replies: CompletionReplies | ChatReplies,
    record: RequestRecord,
) -> Response:
    """The reply; a place among the live sequences is held while it is made."""

    def admitted() -> contextlib.AbstractContextManager[None]:
        return service.lifecycle.admitted(generation.num_choices, service.metrics)

    async def frames() -> AsyncGenerator[bytes, None]:
        with admitted():
            async with contextlib.aclosing(replies.frames()) as made:
                async for data in made:
                    yield data

    async def whole() -> bytes:
        with admitted():
            return await replies.whole()

    common = (service.settings, service.metrics, record.request_id)
    return EventStream(frames(), *common) if fields.stream else WholeReply(whole, *common)
