"""Bodies of requests, as data: completions, chat, tokenising.

Knows nothing of the engine, of what fields do, or of how a body is read (parsing.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

JsonSchema = dict[str, Any]


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream carries besides its deltas."""

    include_usage: bool | None = None
    """A last chunk with no choices and the usage of the whole request."""
    continuous_usage_stats: bool | None = None
    """Usage so far on every chunk."""


class JsonSchemaFormat(msgspec.Struct, frozen=True, kw_only=True):
    """A schema with a name."""

    name: str = ""
    description: str | None = None
    schema: JsonSchema
    strict: Annotated[
        bool | None, Meta(description="Either value: the output always follows the schema.")
    ] = None


class ResponseFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must be: anything, a JSON object, or what a schema says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's form of the same; one of the fields."""

    json: Annotated[JsonSchema | str | None, Meta(description="A JSON schema.")] = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str] | None, Meta(description="The output is one of these.")] = None
    grammar: Annotated[str | None, Meta(description="Lark, or EBNF with `root ::=`.")] = None


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
    response_format: Annotated[
        ResponseFormat | None, Meta(description="What the output must be.")
    ] = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
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
    session_id: Annotated[str | None, Meta(description="A label in the server's log.")] = None


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


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message; only text is taken."""

    type: str
    text: str = ""


class FunctionCall(msgspec.Struct, frozen=True):
    """A function that the model called."""

    name: str
    arguments: Annotated[str, Meta(description="JSON.")]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[ContentPart] | None,
        Meta(description="A text, or text parts joined by newlines."),
    ] = None
    name: str | None = None
    tool_calls: Annotated[
        list[ToolCall] | None, Meta(description="Of an assistant's turn: what it called.")
    ] = None
    tool_call_id: Annotated[
        str | None, Meta(description="Of a tool's turn: the call that it answers.")
    ] = None


class ToolFunction(msgspec.Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: Annotated[
        JsonSchema | None, Meta(description="Schema of the arguments; none: it takes none.")
    ] = None
    strict: Annotated[
        bool | None, Meta(description="Arguments follow the schema also where calls are free.")
    ] = None


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the model may call."""

    type: Literal["function"]
    function: ToolFunction


class FunctionName(msgspec.Struct, frozen=True):
    """Which function."""

    name: str


class NamedTool(msgspec.Struct, frozen=True, kw_only=True):
    """The one tool to call."""

    type: Literal["function"]
    function: FunctionName


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
    tools: Annotated[list[Tool], Meta(description="Functions that the model may call.")] = []
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool,
        Meta(description="Whether it calls one: as it likes, at least one, or a certain one."),
    ] = "auto"
    parallel_tool_calls: Annotated[bool, Meta(description="More than one call may be made.")] = True
    chat_template_kwargs: Annotated[
        dict[str, str | int | float | bool | None],
        Meta(description="Variables that the model's chat template knows."),
    ] = {}


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /tokenize: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    tools: list[Tool] = []
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /detokenize"""

    tokens: list[int]
    model: str | None = None
