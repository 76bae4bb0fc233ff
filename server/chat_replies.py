"""Deltas of a generation as OpenAI's chat completions, whole and in chunks.

Knows nothing of HTTP or of the engine. Where tools may be called, the text of each choice goes
through a `ToolText`, piece by piece in a stream and all at once in a whole reply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import UNSET

from .objects import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatReply,
    FunctionDelta,
    ToolCallDelta,
)
from .protocol import FunctionCall, ToolCall
from .replies import Replies, ReplyHead, TextFrames, encode
from .streaming import frame
from .tool_text import CallPiece, ToolText

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from msgspec import UnsetType

    from ..engine.text import TextTokenizer
    from .generation import Delta, Generation
    from .objects import Usage
    from .prompts import Prompt
    from .protocol import ChatRequest
    from .tools import ToolUse


class _Said(NamedTuple):
    """What a delta's text is to the client."""

    content: str
    calls: list[CallPiece]
    finish_reason: str | None


class ChatReplies(Replies):
    """Replies of /v1/chat/completions."""

    def __init__(
        self,
        request: ChatRequest,
        generation: Generation,
        tokenizer: TextTokenizer,
        head: ReplyHead,
        prompt: Prompt,
        tools: ToolUse | None,
    ) -> None:
        super().__init__(request, generation, tokenizer, head)
        self._prompt = prompt
        self._contents = TextFrames("content", self._empty_frame)
        self._texts = (
            []
            if tools is None
            else [ToolText(tools.names, is_parallel=tools.is_parallel) for _ in range(request.n)]
        )

    async def whole(self) -> bytes:
        """The body of a reply in one piece."""
        merged = await self.merged()
        return encode(
            ChatReply(
                id=self._head.reply_id,
                created=self._head.created,
                model=self._head.model,
                choices=[self._whole_choice(delta) for delta in merged],
                usage=self.usage(),
                prompt_token_ids=list(self._prompt.token_ids) if self._return_token_ids else UNSET,
                prompt_logprobs=(
                    self._logprobs.prompt(merged[0].prompt_logprobs or ())
                    if self._wants_prompt_logprobs
                    else UNSET
                ),
            )
        )

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The frames of a stream, without its `[DONE]`."""
        is_first_chunk = True
        async for delta in self._generation.deltas():
            if delta.is_first:
                role = ChatChunkChoice(
                    index=delta.index, delta=ChatDelta(role="assistant", content="")
                )
                yield frame(encode(self._chunk([role], self.chunk_usage(), is_first_chunk)))
                is_first_chunk = False
            if not self._texts and self.is_plain(delta):
                if delta.text:
                    yield self._contents.frame(delta.index, delta.text)
                continue
            said = self._said(delta)
            delta.text = said.content
            if said.calls or self.is_worth_telling(delta):
                choice = self._chunk_choice(delta, said)
                yield frame(encode(self._chunk([choice], self.chunk_usage())))
        if self._include_usage:
            yield frame(encode(self._chunk([], self.usage())))

    def _empty_frame(self, index: int) -> bytes:
        choice = ChatChunkChoice(index=index, delta=ChatDelta(content=""))
        return frame(encode(self._chunk([choice], self.chunk_usage())))

    def _said(self, delta: Delta) -> _Said:
        if not self._texts:
            return _Said(delta.text, [], delta.finish_reason)
        text = self._texts[delta.index]
        pieces = text.push(delta.text)
        if delta.finish_reason is not None:
            pieces += text.finish()
        calls_tools = text.num_calls and delta.finish_reason == "stop"
        return _Said(
            "".join([piece for piece in pieces if isinstance(piece, str)]),
            [piece for piece in pieces if isinstance(piece, CallPiece)],
            "tool_calls" if calls_tools else delta.finish_reason,
        )

    def _whole_choice(self, delta: Delta) -> ChatChoice:
        said = self._said(delta)
        calls = _joined(said.calls)
        return ChatChoice(
            index=delta.index,
            message=AssistantMessage(
                content=None if calls and not said.content else said.content,
                tool_calls=calls or UNSET,
            ),
            logprobs=self._logprobs.chat(delta.logprobs) if delta.logprobs else None,
            finish_reason=said.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._return_token_ids else UNSET,
        )

    def _chunk_choice(self, delta: Delta, said: _Said) -> ChatChunkChoice:
        ends = delta.finish_reason is not None
        return ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(
                content=UNSET if said.calls and not said.content else said.content,
                tool_calls=_call_deltas(said.calls) or UNSET,
            ),
            logprobs=self._logprobs.chat(delta.logprobs) if delta.logprobs else None,
            finish_reason=said.finish_reason,
            stop_reason=delta.stop_reason if ends else UNSET,
            token_ids=delta.token_ids if self._return_token_ids else UNSET,
        )

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: Usage | UnsetType | None,
        is_first: bool = False,
    ) -> ChatChunk:
        return ChatChunk(
            id=self._head.reply_id,
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=usage,
            prompt_token_ids=(
                list(self._prompt.token_ids) if is_first and self._return_token_ids else UNSET
            ),
        )


def _joined(pieces: Iterable[CallPiece]) -> list[ToolCall]:
    """Whole calls from their pieces."""
    names: dict[int, tuple[str, str]] = {}
    arguments: dict[int, str] = {}
    for piece in pieces:
        if piece.name is not None:
            names[piece.call] = piece.call_id, piece.name
        arguments[piece.call] = arguments.get(piece.call, "") + piece.arguments
    return [
        ToolCall(id=call_id, function=FunctionCall(name, arguments[index]))
        for index, (call_id, name) in names.items()
    ]


def _call_deltas(pieces: Iterable[CallPiece]) -> list[ToolCallDelta]:
    """One delta for each call that has pieces."""
    deltas: dict[int, ToolCallDelta] = {}
    for piece in pieces:
        before = deltas.get(piece.call)
        if before is not None:
            function = FunctionDelta(
                name=before.function.name, arguments=before.function.arguments + piece.arguments
            )
            deltas[piece.call] = msgspec.structs.replace(before, function=function)
        elif piece.name is None:
            deltas[piece.call] = ToolCallDelta(
                index=piece.call, function=FunctionDelta(arguments=piece.arguments)
            )
        else:
            deltas[piece.call] = ToolCallDelta(
                index=piece.call,
                id=piece.call_id,
                type="function",
                function=FunctionDelta(name=piece.name, arguments=piece.arguments),
            )
    return list(deltas.values())
