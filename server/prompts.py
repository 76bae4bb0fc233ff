"""What a request wants continued, as token ids within the model's context.

Knows nothing of sampling, of the engine's work or of replies.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from .chat import ChatError, ChatTemplate
from .errors import ApiError, bad_request, from_value_error
from .settings import MAX_MESSAGES, MAX_PROMPTS, MAX_TEMPLATE_KWARGS
from .tools import as_told, told_as_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..engine.text import TextTokenizer
    from .protocol import ChatMessage, ChatRequest, CompletionRequest, GenerationFields
    from .tools import ToolUse

_LONG_TEXT = 4096
"""Characters beyond which tokenising leaves the event loop."""


class Prompt(msgspec.Struct, frozen=True):
    """One prompt."""

    token_ids: tuple[int, ...]
    text: str | None
    """As the client wrote it, if it wrote text."""


class PromptReader:
    """Reads prompts for one model."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None,
        vocab_size: int,
        max_model_len: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    @property
    def has_chat_template(self) -> bool:
        """Conversations can be made prompts."""
        return self._template is not None

    async def completion(self, request: CompletionRequest, max_tokens: int | None) -> list[Prompt]:
        """The prompts of a completions request; raises ApiError 400."""
        given = request.prompt
        if isinstance(given, list) and given and all(type(item) is int for item in given):
            given = [given]
        texts: list[str | list[int]] = [given] if isinstance(given, str) else list(given)  # type: ignore[arg-type]
        kinds = {type(item) for item in texts}
        if len(kinds) > 1 or int in kinds:
            raise bad_request("prompt", "mixes texts, token ids and lists of token ids")
        if not 0 < len(texts) <= MAX_PROMPTS:
            raise bad_request("prompt", f"{len(texts)} prompts (1 to {MAX_PROMPTS} are allowed)")
        prompts: list[Prompt] = []
        for text in texts:
            if not text:
                raise bad_request("prompt", "is empty")
            if isinstance(text, str):
                token_ids = await self._encode(request, text)
            else:
                token_ids = text
                self._check_vocabulary("prompt", token_ids)
            token_ids = self._fit("prompt", request, token_ids, max_tokens)
            prompts.append(Prompt(token_ids, text if isinstance(text, str) else None))
        return prompts

    @property
    def tells_tools_as_text(self) -> bool:
        """The chat template knows no tools, so they are told in a message."""
        return self._template is not None and not self._template.knows_tools

    async def chat(
        self, request: ChatRequest, tools: ToolUse | None, max_tokens: int | None
    ) -> Prompt:
        """The prompt of a chat request; raises ApiError 400."""
        self._check_size("messages", request, sum(map(_num_chars, request.messages)))
        token_ids = await self.messages(
            request.messages,
            request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=tools,
            variables=request.chat_template_kwargs,
            add_special_tokens=request.add_special_tokens,
        )
        return Prompt(self._fit("messages", request, token_ids, max_tokens), None)

    async def text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text, of any length."""
        if len(text) <= _LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(
            self._tokenizer.encode, text, add_special_tokens=add_special_tokens
        )

    async def messages(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool | None,
        *,
        continue_final_message: bool,
        tools: ToolUse | None = None,
        variables: dict[str, str | int | float | bool | None] | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation, of any length; raises ApiError 400."""
        if self._template is None:
            raise bad_request("messages", "this model has no chat template; use /v1/completions")
        if not 0 < len(messages) <= MAX_MESSAGES:
            raise bad_request("messages", f"{len(messages)} (1 to {MAX_MESSAGES} are allowed)")
        if continue_final_message and add_generation_prompt:
            raise bad_request(
                "continue_final_message", "excludes add_generation_prompt; set one of them"
            )
        if len(variables or {}) > MAX_TEMPLATE_KWARGS:
            raise bad_request("chat_template_kwargs", f"at most {MAX_TEMPLATE_KWARGS} are allowed")
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        turns = [_turn(position, message) for position, message in enumerate(messages)]
        functions = [as_told(tool) for tool in tools.tools] if tools else []
        if self.tells_tools_as_text:
            turns, functions = told_as_text(turns, tools), []

        def encode(template: ChatTemplate) -> list[int]:
            return template.encode(
                turns,
                tools=functions,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
                add_special_tokens=add_special_tokens,
            )

        try:
            if not functions and sum(len(turn["content"]) for turn in turns) <= _LONG_TEXT:
                return encode(self._template)
            return await asyncio.to_thread(encode, self._template)
        except ChatError as error:
            raise from_value_error(error) from None

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Raises ApiError 400 if one is not in the vocabulary."""
        self._check_vocabulary("tokens", token_ids)

    async def _encode(self, request: CompletionRequest, text: str) -> list[int]:
        self._check_size("prompt", request, len(text))
        return await self.text(text, add_special_tokens=request.add_special_tokens)

    def _check_size(self, field: str, request: GenerationFields, num_chars: int) -> None:
        """Raises ApiError 400 for a text that cannot fit, before work is done on it."""
        most = self._max_model_len * self._tokenizer.max_token_bytes
        if request.truncate_prompt_tokens is None and num_chars > most:
            raise bad_request(
                field,
                f"{num_chars} characters are more than {self._max_model_len} tokens of context "
                "can hold",
            )

    def _check_vocabulary(self, field: str, token_ids: Sequence[int]) -> None:
        for bad in (min(token_ids, default=0), max(token_ids, default=0)):
            if not 0 <= bad < self._vocab_size:
                shown = bad if abs(bad) < 10**20 else "of more than 20 digits"
                raise bad_request(
                    field,
                    f"token id {shown} is not in the vocabulary (0 to {self._vocab_size - 1})",
                )

    def _fit(
        self, field: str, request: GenerationFields, token_ids: list[int], max_tokens: int | None
    ) -> tuple[int, ...]:
        """`token_ids` truncated as asked; raises ApiError 400 if context does not hold them."""
        room = self._max_model_len - (max_tokens or 1)
        keep = request.truncate_prompt_tokens
        if keep is not None:
            if keep < -1 or keep == 0 or keep > self._max_model_len:
                raise bad_request(
                    "truncate_prompt_tokens", f"must be -1 or 1 to {self._max_model_len}"
                )
            keep = max(room, 0) if keep == -1 else keep
            if len(token_ids) > keep:
                cut = len(token_ids) - keep
                token_ids = (
                    token_ids[cut:] if request.truncation_side == "left" else token_ids[:keep]
                )
        if not token_ids and room > 0:
            raise bad_request(field, "is empty")
        if len(token_ids) > room:
            wanted = "at least 1" if max_tokens is None else str(max_tokens)
            raise ApiError(
                400,
                f"{field}: {len(token_ids)} prompt tokens and {wanted} to generate are more than "
                f"the context of {self._max_model_len} tokens",
                param=field,
                code="context_length_exceeded",
            )
        return tuple(token_ids)


def _num_chars(message: ChatMessage) -> int:
    content = message.content or ""
    return len(content) if isinstance(content, str) else sum(len(part.text) for part in content)


def _turn(position: int, message: ChatMessage) -> dict[str, Any]:
    where = f"messages[{position}]"
    content = message.content
    if content is None:
        if not message.tool_calls:
            raise bad_request(f"{where}.content", "is missing")
        content = ""
    if not isinstance(content, str):
        for index, part in enumerate(content):
            if part.type != "text":
                raise bad_request(f"{where}.content[{index}].type", "only text parts are supported")
        content = "\n".join(part.text for part in content)
    # `developer` is OpenAI's newer name of `system`; templates know the older one
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        if role != "assistant":
            raise bad_request(f"{where}.tool_calls", "only an assistant's turn can have them")
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return turn


def _arguments(text: str) -> Any:
    """Templates want arguments as an object, not as its text."""
    try:
        return msgspec.json.decode(text or "{}")
    except (msgspec.MsgspecError, RecursionError):
        return text
