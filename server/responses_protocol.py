"""Bodies of /v1/responses, as data: text in, text out, and the events of its streams.

Knows nothing of the engine or of how text is made.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from .objects import ChatLogprob  # noqa: TC001 - msgspec resolves it
from .protocol import JsonSchema  # noqa: TC001 - msgspec resolves it


class InputPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of an input message; only text is taken."""

    type: Annotated[str, Meta(description="input_text or output_text.")]
    text: str = ""


class InputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None


class TextFormat(msgspec.Struct, frozen=True, kw_only=True):
    """What the output must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema: JsonSchema | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the text is made."""

    format: TextFormat = TextFormat()
    verbosity: Annotated[
        Literal["medium"] | None, Meta(description="Nothing but medium is supported.")
    ] = None


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses"""

    input: Annotated[
        str | list[InputMessage],
        Meta(description="A user's text, or a conversation.", examples=["Hello!"]),
    ]
    model: Annotated[str | None, Meta(description="A served name; may be left out.")] = None
    instructions: Annotated[str | None, Meta(description="A system message before it all.")] = None
    max_output_tokens: int | None = None
    temperature: Annotated[float | None, Meta(description="0 is greedy.")] = None
    top_p: float | None = None
    text: TextOptions = TextOptions()
    stream: bool = False
    include: Annotated[
        list[Literal["message.output_text.logprobs"]],
        Meta(description="What the reply has besides the text."),
    ] = []
    top_logprobs: Annotated[
        int, Meta(description="Rivals to tell of each token; needs include.")
    ] = 0
    metadata: Annotated[dict[str, str], Meta(description="Comes back in the reply.")] = {}
    parallel_tool_calls: bool = True
    user: Annotated[str | None, Meta(description="A label in the server's log.")] = None
    priority: Annotated[int, Meta(description="Lower runs sooner.")] = 0
    cache_salt: str | None = None
    request_id: str | None = None


class OutputText(msgspec.Struct, frozen=True, kw_only=True):
    """The text of an answer."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = []
    logprobs: list[ChatLogprob] = []


class OutputMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class IncompleteDetails(msgspec.Struct, frozen=True):
    """Why the answer is cut."""

    reason: Literal["max_output_tokens"]


class InputDetails(msgspec.Struct, frozen=True):
    """Where the input's state came from."""

    cached_tokens: int


class OutputDetails(msgspec.Struct, frozen=True):
    """What the output's tokens were for."""

    reasoning_tokens: int = 0


class ResponsesUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of a request."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class ResponsesReply(msgspec.Struct, frozen=True, kw_only=True):
    """An answer and what it was asked with."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    store: bool = False
    temperature: float
    text: TextOptions
    tool_choice: Literal["auto"] = "auto"
    tools: list[str] = []
    top_logprobs: int = 0
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None = None
    metadata: dict[str, str] = {}


class ResponsesEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponsesReply | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: OutputMessage | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    logprobs: list[ChatLogprob] | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET
