"""Deltas of a generation as OpenAI's completions, whole and in chunks; what chat has in common.

Knows nothing of HTTP or of the engine. A whole reply is the merge of all deltas put through the
same function as each chunk, so the two cannot differ.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from ..engine.text import OutputText
from .generation import Delta
from .logprobs import LogprobWriter
from .objects import CompletionChoice, CompletionReply, PromptTokensDetails, Usage
from .streaming import frame

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from msgspec import UnsetType

    from ..engine.text import TextTokenizer
    from .generation import Generation
    from .prompts import Prompt
    from .protocol import ChatRequest, CompletionRequest

encode = msgspec.json.Encoder().encode


class ReplyHead(NamedTuple):
    """What every object of one reply repeats."""

    reply_id: str
    created: int
    """Unix time, seconds."""
    model: str


class Replies:
    """What completions and chat share."""

    def __init__(
        self,
        request: CompletionRequest | ChatRequest,
        generation: Generation,
        tokenizer: TextTokenizer,
        head: ReplyHead,
    ) -> None:
        self._generation = generation
        self._tokenizer = tokenizer
        self._head = head
        self._return_token_ids = request.return_token_ids
        self._logprobs = LogprobWriter(tokenizer, as_token_ids=request.return_tokens_as_token_ids)
        self._wants_prompt_logprobs = request.prompt_logprobs is not None
        options = request.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats)
        self._tells_all = self._return_token_ids or self._continuous_usage

    def is_worth_telling(self, delta: Delta) -> bool:
        """Whether a stream has a chunk for it."""
        return bool(
            delta.text or delta.finish_reason is not None or delta.logprobs or self._tells_all
        )

    def is_plain(self, delta: Delta) -> bool:
        """Whether its chunk differs from the choice's others in nothing but the text."""
        return not (
            delta.is_first or delta.finish_reason is not None or delta.logprobs or self._tells_all
        )

    def usage(self) -> Usage:
        """Tokens so far."""
        generation = self._generation
        return Usage(
            prompt_tokens=generation.prompt_tokens,
            completion_tokens=generation.completion_tokens,
            total_tokens=generation.prompt_tokens + generation.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(generation.cached_tokens),
        )

    def chunk_usage(self) -> Usage | UnsetType | None:
        """What a chunk says of usage: nothing, null, or the tokens so far."""
        if self._continuous_usage:
            return self.usage()
        return None if self._include_usage else msgspec.UNSET

    async def merged(self) -> list[Delta]:
        """Every choice's deltas as one, by index."""
        choices: dict[int, list[Delta]] = {}
        async for delta in self._generation.deltas():
            choices.setdefault(delta.index, []).append(delta)
        return [_merge(choices[index]) for index in sorted(choices)]


class TextFrames:
    """Frames of chunks in which nothing changes but the text: nearly all of a stream.

    What stands around the text is written once a choice.
    """

    def __init__(self, field: str, whole: Callable[[int], bytes]) -> None:
        """`whole(index)`: the frame of a choice whose `field` is an empty text."""
        self._mark = f'"{field}":'.encode()
        self._whole = whole
        self._around: dict[int, tuple[bytes, bytes]] = {}

    def frame(self, index: int, text: str) -> bytes:
        """The frame of `text`, of the choice with this index."""
        around = self._around.get(index)
        if around is None:
            # within a JSON string the marks would be escaped
            before, _, after = self._whole(index).partition(self._mark + b'""')
            around = self._around[index] = before + self._mark, after
        return b"%b%b%b" % (around[0], encode(text), around[1])


class CompletionReplies(Replies):
    """Replies of /v1/completions."""

    def __init__(
        self,
        request: CompletionRequest,
        generation: Generation,
        tokenizer: TextTokenizer,
        head: ReplyHead,
        prompts: Sequence[Prompt],
    ) -> None:
        super().__init__(request, generation, tokenizer, head)
        self._prompts = prompts
        self._n = request.n
        self._echo = request.echo
        self._wants_logprobs = request.logprobs is not None
        self._skip_special = request.skip_special_tokens
        self._echoes: dict[int, tuple[str, list[int]]] = {}
        self._texts = TextFrames("text", lambda index: self._frame(Delta.empty(index)))

    async def whole(self) -> bytes:
        """The body of a reply in one piece."""
        choices = [self._choice(delta) for delta in await self.merged()]
        return encode(self._reply(choices, self.usage()))

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The frames of a stream, without its `[DONE]`."""
        async for delta in self._generation.deltas():
            if self.is_plain(delta):
                if delta.text:
                    yield self._texts.frame(delta.index, delta.text)
            elif self.is_worth_telling(delta) or (delta.is_first and self._echo):
                yield self._frame(delta)
        if self._include_usage:
            yield frame(encode(self._reply([], self.usage())))

    def _frame(self, delta: Delta) -> bytes:
        return frame(encode(self._reply([self._choice(delta)], self.chunk_usage())))

    def _reply(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> CompletionReply:
        return CompletionReply(
            id=self._head.reply_id,
            created=self._head.created,
            model=self._head.model,
            choices=choices,
            usage=usage,
        )

    def _choice(self, delta: Delta) -> CompletionChoice:
        position = delta.index // self._n
        told = self._with_prompt(position, delta) if self._echo else delta
        return CompletionChoice(
            index=delta.index,
            text=told.text,
            logprobs=(
                self._logprobs.completion(told.token_ids, told.logprobs, told.offsets)
                if self._wants_logprobs and told.token_ids
                else None
            ),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._return_token_ids else msgspec.UNSET,
            prompt_token_ids=(
                list(self._prompts[position].token_ids)
                if self._return_token_ids and delta.is_first
                else msgspec.UNSET
            ),
            prompt_logprobs=(
                self._logprobs.prompt(delta.prompt_logprobs)
                if self._wants_prompt_logprobs and delta.prompt_logprobs is not None
                else msgspec.UNSET
            ),
        )

    def _with_prompt(self, position: int, delta: Delta) -> Delta:
        """`delta` with its prompt before it, if it is the choice's first; else shifted by it."""
        text, offsets = self._echoed(position)
        shifted = [len(text) + offset for offset in delta.offsets]
        if not delta.is_first:
            return dataclasses.replace(delta, offsets=shifted)
        return dataclasses.replace(
            delta,
            text=text + delta.text,
            token_ids=[*self._prompts[position].token_ids, *delta.token_ids],
            logprobs=[*(delta.prompt_logprobs or ()), *delta.logprobs],
            offsets=[*offsets, *shifted],
        )

    def _echoed(self, position: int) -> tuple[str, list[int]]:
        """A prompt's text and where each of its tokens begins in it."""
        if position not in self._echoes:
            prompt = self._prompts[position]
            output = OutputText(self._tokenizer, skip_special_tokens=self._skip_special)
            text, offsets = "", []
            for token_id in prompt.token_ids:
                offsets.append(output.num_chars)
                text += output.push(token_id)
            text += output.finish()
            self._echoes[position] = (text if prompt.text is None else prompt.text, offsets)
        return self._echoes[position]


def _merge(deltas: Iterable[Delta]) -> Delta:
    deltas = list(deltas)
    return Delta(
        index=deltas[0].index,
        is_first=True,
        text="".join([delta.text for delta in deltas]),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for delta in deltas for entry in delta.logprobs],
        offsets=[offset for delta in deltas for offset in delta.offsets],
        finish_reason=deltas[-1].finish_reason,
        stop_reason=deltas[-1].stop_reason,
        prompt_logprobs=deltas[0].prompt_logprobs,
    )
