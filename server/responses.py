"""/v1/responses in terms of chat: its request as a chat request, and deltas as its objects.

Knows nothing of HTTP or of the engine. A stream's events carry the whole answer again at its end,
as OpenAI's do; what they add up to is the reply without a stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from .errors import ApiError, bad_request
from .protocol import ChatMessage, ChatRequest, ContentPart, JsonSchemaFormat, ResponseFormat
from .replies import Replies, ReplyHead, encode
from .responses_protocol import (
    IncompleteDetails,
    InputDetails,
    OutputMessage,
    OutputText,
    ResponsesEvent,
    ResponsesReply,
    ResponsesUsage,
)
from .settings import MAX_METADATA
from .streaming import Ending

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ..engine.messages import SamplingParams
    from ..engine.text import TextTokenizer
    from .generation import Delta, Generation
    from .objects import ChatLogprob, Usage
    from .responses_protocol import InputMessage, ResponsesRequest, TextFormat

_TERMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Fields of chat and what they are called here."""
_TEXT_PARTS = ("input_text", "output_text", "text")

Status = Literal["in_progress", "completed", "incomplete"]


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The chat request that asks for the same; raises ApiError 400."""
    if len(request.metadata) > MAX_METADATA:
        raise bad_request("metadata", f"more than {MAX_METADATA} entries")
    if request.top_logprobs and not request.include:
        raise bad_request("top_logprobs", "needs include to have message.output_text.logprobs")
    messages: list[ChatMessage] = []
    if request.instructions is not None:
        messages.append(ChatMessage(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(ChatMessage(role="user", content=request.input))
    else:
        messages += [_message(position, turn) for position, turn in enumerate(request.input)]
    if not request.input:
        raise bad_request("input", "is empty")
    return ChatRequest(
        messages=messages,
        model=request.model,
        max_completion_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        response_format=_format(request.text.format),
        logprobs=bool(request.include),
        top_logprobs=request.top_logprobs if request.include else None,
        stream=request.stream,
        user=request.user,
        priority=request.priority,
        cache_salt=request.cache_salt,
        request_id=request.request_id,
    )


def in_its_terms(error: ApiError) -> ApiError:
    """`error` of the chat request, naming the field that the client wrote."""
    for chat, here in _TERMS.items():
        if error.param is not None and error.param.partition("[")[0] == chat:
            param = here + error.param.removeprefix(chat)
            message = str(error).replace(error.param, param, 1)
            return ApiError(
                error.status, message, param=param, code=error.code, headers=error.headers
            )
    return error


def _message(position: int, turn: InputMessage) -> ChatMessage:
    if isinstance(turn.content, str):
        return ChatMessage(role=turn.role, content=turn.content)
    for index, part in enumerate(turn.content):
        if part.type not in _TEXT_PARTS:
            raise bad_request(
                f"input[{position}].content[{index}].type", "only text parts are supported"
            )
    parts = [ContentPart("text", part.text) for part in turn.content]
    return ChatMessage(role=turn.role, content=parts)


def _format(asked: TextFormat) -> ResponseFormat:
    if asked.type != "json_schema":
        return ResponseFormat(type=asked.type)
    if asked.schema is None:
        raise bad_request("text.format.schema", "is missing")
    return ResponseFormat(
        type="json_schema",
        json_schema=JsonSchemaFormat(name=asked.name or "", schema=asked.schema),
    )


class ResponsesReplies(Replies):
    """Replies of /v1/responses."""

    def __init__(
        self,
        request: ResponsesRequest,
        chat: ChatRequest,
        params: SamplingParams,
        generation: Generation,
        tokenizer: TextTokenizer,
        head: ReplyHead,
    ) -> None:
        super().__init__(chat, generation, tokenizer, head)
        self._request = request
        self._params = params
        self._item_id = f"msg_{head.reply_id.partition('_')[2]}"
        self._number = 0
        self.ending = Ending(b"", self._failed)
        """The end of its streams: the last event says that it is the last."""

    async def whole(self) -> bytes:
        """The body of a reply in one piece."""
        [delta] = await self.merged()
        part = OutputText(text=delta.text, logprobs=self._told(delta))
        return encode(self._ended(part, delta.finish_reason))

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The events of a stream."""
        place = {"output_index": 0, "item_id": self._item_id, "content_index": 0}
        text, finish_reason = "", None
        logprobs: list[ChatLogprob] = []
        is_first = True
        async for delta in self._generation.deltas():
            if is_first:
                is_first = False
                begun = self._reply("in_progress", [])
                yield self._event("response.created", response=begun)
                yield self._event("response.in_progress", response=begun)
                item = self._item("in_progress", [])
                yield self._event("response.output_item.added", output_index=0, item=item)
                part = OutputText(text="")
                yield self._event("response.content_part.added", part=part, **place)
            if delta.text or delta.logprobs:
                text += delta.text
                told = self._told(delta)
                logprobs += told
                yield self._event(
                    "response.output_text.delta", delta=delta.text, logprobs=told, **place
                )
            finish_reason = delta.finish_reason
        part = OutputText(text=text, logprobs=logprobs)
        reply = self._ended(part, finish_reason)
        yield self._event("response.output_text.done", text=text, logprobs=logprobs, **place)
        yield self._event("response.content_part.done", part=part, **place)
        yield self._event("response.output_item.done", output_index=0, item=reply.output[0])
        yield self._event(f"response.{reply.status}", response=reply)

    def _told(self, delta: Delta) -> list[ChatLogprob]:
        return self._logprobs.chat(delta.logprobs).content

    def _ended(self, part: OutputText, finish_reason: str | None) -> ResponsesReply:
        status: Status = "incomplete" if finish_reason == "length" else "completed"
        return self._reply(status, [self._item(status, [part])], self.usage())

    def _item(self, status: Status, content: list[OutputText]) -> OutputMessage:
        return OutputMessage(id=self._item_id, status=status, content=content)

    def _reply(
        self, status: Status, output: list[OutputMessage], usage: Usage | None = None
    ) -> ResponsesReply:
        request = self._request
        return ResponsesReply(
            id=self._head.reply_id,
            created_at=self._head.created,
            status=status,
            incomplete_details=(
                IncompleteDetails("max_output_tokens") if status == "incomplete" else None
            ),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            model=self._head.model,
            output=output,
            parallel_tool_calls=request.parallel_tool_calls,
            temperature=self._params.temperature,
            text=request.text,
            top_logprobs=request.top_logprobs,
            top_p=self._params.top_p,
            usage=None if usage is None else _usage(usage),
            user=request.user,
            metadata=request.metadata,
        )

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = ResponsesEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode(event) + b"\n\n"

    def _failed(self, error: ApiError) -> bytes:
        detail = error.detail()
        return self._event(
            "error", code=str(detail.code), message=detail.message, param=detail.param
        )


def _usage(usage: Usage) -> ResponsesUsage:
    return ResponsesUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputDetails(usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )
