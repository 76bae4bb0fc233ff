"""Bodies for the OpenAPI description: one for each thing that people come for.

Every one of them is a request that this server answers; a test sends them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .responses_protocol import ResponsesRequest

if TYPE_CHECKING:
    import msgspec

_HELLO = [{"role": "user", "content": "Hello!"}]
_PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}

EXAMPLES: dict[type[msgspec.Struct], dict[str, dict[str, Any]]] = {
    CompletionRequest: {
        "Continue a text": {"prompt": "Once upon a time", "max_tokens": 32},
        "Stream": {
            "prompt": "Once upon a time",
            "max_tokens": 32,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        "Score a prompt": {
            "prompt": "The capital of France is Paris",
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        },
        "Several prompts, several choices": {
            "prompt": ["One, two,", "A, B,"],
            "n": 2,
            "max_tokens": 8,
            "temperature": 0.8,
            "seed": 7,
        },
        "One of a few words": {
            "prompt": "The sky is",
            "structured_outputs": {"choice": [" blue", " green"]},
        },
    },
    ChatRequest: {
        "Ask": {"messages": _HELLO, "max_completion_tokens": 64},
        "Stream": {"messages": _HELLO, "max_completion_tokens": 64, "stream": True},
        "Log-probabilities": {
            "messages": _HELLO,
            "max_completion_tokens": 8,
            "logprobs": True,
            "top_logprobs": 3,
        },
        "JSON by a schema": {
            "messages": [{"role": "user", "content": "Invent a person."}],
            "max_completion_tokens": 64,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": _PERSON, "strict": True},
            },
        },
        "A tool that must be called": {
            "messages": [{"role": "user", "content": "How is the weather in Paris?"}],
            "max_completion_tokens": 64,
            "tools": [_WEATHER],
            "tool_choice": "required",
        },
        "A tool's answer": {
            "messages": [
                {"role": "user", "content": "How is the weather in Paris?"},
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_1", "content": "Sunny, 21 degrees."},
            ],
            "max_completion_tokens": 64,
            "tools": [_WEATHER],
        },
    },
    ResponsesRequest: {
        "Ask": {"input": "Hello!", "max_output_tokens": 64},
        "A conversation, streamed": {
            "instructions": "Answer in one word.",
            "input": [
                {"role": "user", "content": "Hello!"},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": [{"type": "input_text", "text": "And now?"}]},
            ],
            "max_output_tokens": 64,
            "stream": True,
        },
    },
    TokenizeRequest: {
        "A text": {"prompt": "Hello!", "return_token_strs": True},
        "A conversation": {"messages": _HELLO},
    },
    DetokenizeRequest: {"Token ids": {"tokens": [1, 2, 3]}},
}
