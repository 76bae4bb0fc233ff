"""Bodies of requests and replies, as data, and the reading of a body into one.

Knows nothing of the engine or of what fields do. Reading is strict about types (a string is never
a number), drops nulls, ignores fields nobody knows and refuses by name those that OpenAI's or
vLLM's API has and this server does not act on.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .errors import ApiError, bad_request

TokenText = str
TopLogprobs = dict[str, float]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides its deltas."""

    include_usage: bool | None = None
    """A last chunk with no choices and the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Usage so far on every chunk."""


class GenerationFields(msgspec.Struct, frozen=True, kw_only=True):
    """What completions and chat have in common. None: the model's default, then OpenAI's."""

    model: Annotated[str | None, Meta(description="A served name; may be left out.")] = None
    max_tokens: Annotated[int | None, Meta(description="Most tokens to generate.")] = None
    min_tokens: Annotated[int, Meta(description="Tokens before which nothing stops.")] = 0
    n: Annotated[int, Meta(description="Choices per prompt.")] = 1
    temperature: Annotated[float | None, Meta(description="0 is greedy.")] = None
    top_p: float | None = None
    top_k: Annotated[int | None, Meta(description="0 or -1: off.")] = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Annotated[
        dict[str, float], Meta(description="Token id to a bias of -100 to 100.")
    ] = {}
    seed: Annotated[int | None, Meta(description="Same seed, same tokens.")] = None
    stop: Annotated[
        str | list[str], Meta(description="Texts that end the output and are left out of it.")
    ] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    bad_words: Annotated[list[str], Meta(description="Words that may not be generated.")] = []
    allowed_token_ids: list[int] | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: Annotated[
        bool, Meta(description="Either value: no space is ever put in.")
    ] = True
    prompt_logprobs: Annotated[
        int | None, Meta(description="Log-probabilities of the prompt's tokens and so many rivals.")
    ] = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: Annotated[
        bool, Meta(description="Logprobs name tokens `token_id:123`.")
    ] = False
    truncate_prompt_tokens: Annotated[
        int | None, Meta(description="Keep so many tokens of the prompt; -1: as many as fit.")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"], Meta(description="Where tokens are cut off.")
    ] = "left"
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Meta(description="Lower runs sooner.")] = 0
    cache_salt: Annotated[
        str | None,
        Meta(
            description="Cached prompt prefixes are shared only under the same salt (and API key)."
        ),
    ] = None
    user: Annotated[str | None, Meta(description="A label in the server's log.")] = None
    request_id: Annotated[str | None, Meta(description="Like the header X-Request-Id.")] = None


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/completions"""

    prompt: Annotated[
        str | list[str | int | list[int]],
        Meta(description="A text, token ids, or a list of either.", examples=["Once upon a time"]),
    ]
    echo: Annotated[bool, Meta(description="The text begins with the prompt.")] = False
    logprobs: Annotated[
        int | None, Meta(description="Log-probabilities of tokens and of so many rivals.")
    ] = None
    add_special_tokens: Annotated[
        bool, Meta(description="Add the tokenizer's own, such as a bos.")
    ] = True


class ChatMessage(msgspec.Struct, frozen=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        str | list[ContentPart], Meta(description="A text, or text parts joined by newlines.")
    ]
    name: str | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message; only text is taken."""

    type: str
    text: str = ""


class ChatRequest(GenerationFields, frozen=True, kw_only=True):
    """POST /v1/chat/completions"""

    messages: Annotated[list[ChatMessage], Meta(examples=[[{"role": "user", "content": "Hello!"}]])]
    max_completion_tokens: Annotated[int | None, Meta(description="Wins over max_tokens.")] = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Meta(description="Rivals per token; wants logprobs.")] = (
        None
    )
    add_generation_prompt: Annotated[
        bool | None, Meta(description="End the prompt where the assistant's turn begins.")
    ] = None
    continue_final_message: Annotated[
        bool, Meta(description="Go on with the last message instead of answering it.")
    ] = False
    add_special_tokens: Annotated[
        bool, Meta(description="Add the tokenizer's own to what the template wrote.")
    ] = False
    chat_template_kwargs: Annotated[
        dict[str, str | int | float | bool | None],
        Meta(description="Variables that the model's chat template knows."),
    ] = {}


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize"""

    tokens: list[int]
    model: str | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Where the prompt's state came from."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Tokens of a request, over all prompts and choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct, frozen=True):
    """One candidate at a prompt position."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities in the completions form: parallel lists."""

    tokens: list[TokenText]
    token_logprobs: list[float | None]
    top_logprobs: list[TopLogprobs | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One continuation, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionReply(msgspec.Struct, frozen=True, kw_only=True):
    """A completion, or one chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """A rival of a chosen token."""

    token: TokenText
    logprob: float
    bytes: list[int]


class ChatLogprob(msgspec.Struct, frozen=True):
    """A chosen token."""

    token: TokenText
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities in the chat form: a list of records."""

    content: list[ChatLogprob]


class AssistantMessage(msgspec.Struct, frozen=True):
    """The answer."""

    role: Literal["assistant"]
    content: str


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatReply(msgspec.Struct, frozen=True, kw_only=True):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "convserve"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[dict[str, str]] = []


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """All names the model is served under."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeReply(msgspec.Struct, frozen=True, kw_only=True):
    """Token ids of a prompt."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeReply(msgspec.Struct, frozen=True):
    """The text of token ids."""

    prompt: str


_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "prompt_embeds": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "stream_interval": (1,),
    "structured_outputs": (),
    "thinking_token_budget": (),
    "use_beam_search": (False,),
}
"""Known fields that are not acted on, and the values (besides null) that ask for nothing."""

_UNSUPPORTED_COMPLETION = _UNSUPPORTED | {"suffix": ("",)}
_UNSUPPORTED_CHAT = _UNSUPPORTED | {
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
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_UNSUPPORTED_MESSAGE: dict[str, tuple[object, ...]] = {
    "audio": (),
    "function_call": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}

T = TypeVar("T", bound=msgspec.Struct)


def parse(body: bytes, kind: type[T]) -> T:
    """Reads a JSON body as `kind`; raises ApiError 400 naming the field at fault."""
    try:
        fields = msgspec.json.decode(body)
    except RecursionError:
        raise bad_request(None, "the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(None, f"the body is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise bad_request(None, "the body must be a JSON object")
    fields = {name: value for name, value in fields.items() if value is not None}
    if issubclass(kind, GenerationFields):
        chat = issubclass(kind, ChatRequest)
        _refuse(fields, _UNSUPPORTED_CHAT if chat else _UNSUPPORTED_COMPLETION, "")
        if "best_of" in fields and fields["best_of"] != fields.get("n", 1):
            raise bad_request("best_of", "is not supported unless equal to n")
    messages = fields.get("messages")
    for position, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _refuse(message, _UNSUPPORTED_MESSAGE, f"messages[{position}].")
    try:
        return msgspec.convert(fields, kind)
    except RecursionError:
        raise bad_request(None, "the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _field_error(str(error)) from None


def _refuse(fields: dict[str, Any], table: dict[str, tuple[object, ...]], where: str) -> None:
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
