"""The routes that generate text: validate, admit, generate, answer or stream.

Knows nothing of how text is made or of how replies are written.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from fastapi import FastAPI, Request
from starlette.responses import Response

from .bodies import read_body
from .chat_replies import ChatReplies
from .errors import ApiError, bad_request
from .generation import Generation, Work
from .middleware import clean_label, record_of
from .objects import ChatChunk, ChatReply, CompletionReply
from .openapi import described
from .prefix_salt import cache_salt
from .protocol import ChatRequest, CompletionRequest
from .replies import CompletionReplies, ReplyHead
from .responses import ResponsesReplies, as_chat, in_its_terms
from .responses_protocol import ResponsesEvent, ResponsesReply, ResponsesRequest
from .sampling import is_score_only, sampling_params, stop_strings
from .streaming import CHUNKS_END, Ending, EventStream, WholeReply
from .structured import structure_of
from .tools import call_structure, tool_use

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine.messages import SamplingParams
    from .middleware import RequestRecord
    from .prompts import Prompt
    from .service import Service
    from .structured import Structure
    from .tools import ToolUse

Fields = TypeVar("Fields", CompletionRequest, ChatRequest, ResponsesRequest)

_MAX_PRIORITY = 2**31 - 1


def add_generation_routes(app: FastAPI, service: Service) -> None:
    """/v1/completions, /v1/chat/completions and /v1/responses."""

    @app.post(
        "/v1/completions", **described(CompletionRequest, CompletionReply, event=CompletionReply)
    )
    async def completions(request: Request) -> Response:
        """Continues a prompt, or several."""
        fields = await _read(service, request, CompletionRequest)
        record = _accepted(service, request, fields)
        structure = structure_of(fields)
        params = await _sampling(service, fields, structure)
        prompts = await service.prompts.completion(fields, params.max_tokens)
        generation = _generation(service, fields, params, prompts, record, structure)
        head = _head(service, fields, f"cmpl-{record.request_id}")
        replies = CompletionReplies(fields, generation, service.tokenizer, head, prompts)
        return _answer(service, fields, generation, replies, record)

    @app.post("/v1/chat/completions", **described(ChatRequest, ChatReply, event=ChatChunk))
    async def chat_completions(request: Request) -> Response:
        """Answers a conversation."""
        fields = await _read(service, request, ChatRequest)
        record = _accepted(service, request, fields)
        tools = tool_use(fields)
        structure = _chat_structure(service, fields, tools)
        params = await _sampling(service, fields, structure)
        prompt = await service.prompts.chat(fields, tools, params.max_tokens)
        generation = _generation(service, fields, params, [prompt], record, structure)
        head = _head(service, fields, f"chatcmpl-{record.request_id}")
        replies = ChatReplies(fields, generation, service.tokenizer, head, prompt, tools)
        return _answer(service, fields, generation, replies, record)

    @app.post("/v1/responses", **described(ResponsesRequest, ResponsesReply, event=ResponsesEvent))
    async def responses(request: Request) -> Response:
        """Answers a text or a conversation, in the newer form of OpenAI's API."""
        fields = await _read(service, request, ResponsesRequest)
        try:
            chat = as_chat(fields)
            record = _accepted(service, request, chat)
            structure = structure_of(chat)
            params = await _sampling(service, chat, structure)
            prompt = await service.prompts.chat(chat, None, params.max_tokens)
            generation = _generation(service, chat, params, [prompt], record, structure)
        except ApiError as error:
            raise in_its_terms(error) from None
        head = _head(service, chat, f"resp_{record.request_id}")
        replies = ResponsesReplies(fields, chat, params, generation, service.tokenizer, head)
        return _answer(service, chat, generation, replies, record, replies.ending)


async def _read(service: Service, request: Request, kind: type[Fields]) -> Fields:
    """The body, if the server takes work; raises ApiError."""
    service.lifecycle.check(1, service.metrics)
    return await read_body(request, kind, service.settings)


def _accepted(
    service: Service, request: Request, fields: CompletionRequest | ChatRequest
) -> RequestRecord:
    """The record, which now has the client's labels; raises ApiError."""
    service.check_model(fields.model)
    if fields.stream_options is not None and not fields.stream:
        raise bad_request("stream_options", "needs stream to be true")
    if abs(fields.priority) > _MAX_PRIORITY:
        raise bad_request("priority", f"is out of range (-{_MAX_PRIORITY} to {_MAX_PRIORITY})")
    record = record_of(request.scope)
    record.user = clean_label(fields.user)
    record.session = clean_label(fields.session_id)
    if record.label is None:
        record.label = clean_label(fields.request_id)
    return record


def _chat_structure(
    service: Service, fields: ChatRequest, tools: ToolUse | None
) -> Structure | None:
    """What the answer must be: a structure that was asked for, or calls."""
    asked = structure_of(fields)
    if tools is None:
        return asked
    if asked is not None:
        raise bad_request(asked.field, "cannot be combined with tools")
    return call_structure(tools, in_list=service.prompts.tells_tools_as_text)


async def _sampling(
    service: Service, fields: CompletionRequest | ChatRequest, structure: Structure | None
) -> SamplingParams:
    params = sampling_params(fields, service.defaults, service.info, service.tokenizer, structure)
    await service.check_structure(structure)
    return params


def _generation(
    service: Service,
    fields: CompletionRequest | ChatRequest,
    params: SamplingParams,
    prompts: Sequence[Prompt],
    record: RequestRecord,
    structure: Structure | None,
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
        grammar_field=None if structure is None else structure.field,
    )
    most = service.lifecycle.capacity
    if work.num_choices > most:
        raise bad_request("n", f"{work.num_choices} choices over all prompts (at most {most})")
    generation = Generation(
        work, service.client, service.tokenizer, service.metrics, record.started, service.parity
    )
    generation.trace_id = record.trace_id
    record.generation = generation
    return generation


def _head(service: Service, fields: CompletionRequest | ChatRequest, reply_id: str) -> ReplyHead:
    return ReplyHead(reply_id, int(time.time()), fields.model or service.model)


def _answer(
    service: Service,
    fields: CompletionRequest | ChatRequest,
    generation: Generation,
    replies: CompletionReplies | ChatReplies | ResponsesReplies,
    record: RequestRecord,
    ending: Ending = CHUNKS_END,
) -> Response:
    """The reply; a place among the live sequences is held while it is made."""
    common = (
        service.settings,
        service.metrics,
        record.request_id,
        service.lifecycle.admitted(generation.num_choices, service.metrics),
    )
    if fields.stream:
        return EventStream(replies.frames(), *common, ending)
    return WholeReply(replies.whole, *common)
