"""Bounds of request fields as the OpenAPI description tells them.

They are checked where the fields are used, with words of their own. What depends on the model or on
another field (vocabulary, context, max_tokens) is not here. Knows nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..engine.sampling_checks import (
    MAX_CHOICES,
    MAX_GRAMMAR_CHARS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
)
from .protocol import ChatRequest, CompletionRequest, TokenizeRequest
from .responses_protocol import ResponsesRequest
from .settings import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_CACHE_SALT_CHARS,
    MAX_MESSAGES,
    MAX_METADATA,
    MAX_OUTPUT_CHOICES,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TEMPLATE_KWARGS,
    MAX_TOOLS,
)

if TYPE_CHECKING:
    import msgspec

    Bounds = dict[str, dict[str, Any]]

_INT32 = 2**31 - 1


def _range(low: float, high: float) -> dict[str, Any]:
    return {"minimum": low, "maximum": high}


_SAMPLING: Bounds = {
    "temperature": _range(0, 100),
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "priority": _range(-_INT32, _INT32),
    "cache_salt": {
        "minLength": 1,
        "maxLength": MAX_CACHE_SALT_CHARS,
        "pattern": r"^[^@/\\\x00]*$",
    },
}
_GENERATION: Bounds = _SAMPLING | {
    "max_tokens": _range(0, _INT32),
    "min_tokens": _range(0, _INT32),
    "n": _range(1, MAX_CHOICES),
    "top_k": _range(-1, _INT32),
    "min_p": _range(0, 1),
    "repetition_penalty": _range(0.01, 100),
    "presence_penalty": _range(-2, 2),
    "frequency_penalty": _range(-2, 2),
    "logit_bias": {
        "maxProperties": MAX_LOGIT_BIAS,
        "propertyNames": {"pattern": "^[0-9]{1,10}$"},
        "additionalProperties": {"type": "number", **_range(-100, 100)},
    },
    "seed": _range(-(2**63), 2**63 - 1),
    "stop": {"minLength": 1, "maxLength": MAX_STOP_CHARS, "maxItems": MAX_STOPS},
    "stop_token_ids": {"maxItems": MAX_STOP_TOKENS, "items": {"type": "integer", "minimum": 0}},
    "bad_words": {
        "maxItems": MAX_BAD_WORDS,
        "items": {"type": "string", "minLength": 1, "maxLength": MAX_BAD_WORD_CHARS},
    },
    "allowed_token_ids": {"minItems": 1, "items": {"type": "integer", "minimum": 0}},
    "prompt_logprobs": _range(0, MAX_LOGPROBS),
    "truncate_prompt_tokens": {"minimum": -1},
    "guided_regex": {"maxLength": MAX_GRAMMAR_CHARS},
    "guided_choice": {
        "minItems": 1,
        "maxItems": MAX_OUTPUT_CHOICES,
        "items": {"type": "string", "minLength": 1},
    },
    "guided_grammar": {"maxLength": MAX_GRAMMAR_CHARS},
}

BOUNDS: dict[type[msgspec.Struct], Bounds] = {
    CompletionRequest: _GENERATION
    | {
        "prompt": {"minLength": 1, "minItems": 1, "maxItems": MAX_PROMPTS},
        "logprobs": _range(0, MAX_LOGPROBS),
    },
    ChatRequest: _GENERATION
    | {
        "messages": {"minItems": 1, "maxItems": MAX_MESSAGES},
        "max_tokens": _range(1, _INT32),
        "max_completion_tokens": _range(1, _INT32),
        "top_logprobs": _range(0, MAX_LOGPROBS),
        "tools": {"maxItems": MAX_TOOLS},
        "chat_template_kwargs": {"maxProperties": MAX_TEMPLATE_KWARGS},
    },
    ResponsesRequest: _SAMPLING
    | {
        "input": {"minLength": 1, "minItems": 1, "maxItems": MAX_MESSAGES},
        "max_output_tokens": _range(1, _INT32),
        "metadata": {"maxProperties": MAX_METADATA},
    },
    TokenizeRequest: {"messages": {"minItems": 1, "maxItems": MAX_MESSAGES}},
}
