"""The ranges of sampling fields: one clear sentence for the first field that is out of them.

Knows nothing of requests, models or tensors. The engine assumes that its parameters passed here,
so what could overflow, index out of the vocabulary or leave no token to choose is refused here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .messages import Grammar

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from .messages import SamplingParams

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKENS = 128
MAX_BAD_SEQUENCES = 1024
MAX_BAD_LENGTH = 64
MAX_GRAMMAR_CHARS = 64 * 1024
MIN_TEMPERATURE = 1e-5
"""Below it only 0 is allowed: dividing logits by less would overflow."""

_INT32 = 2**31 - 1
_INT64 = 2**63 - 1


def check_sampling(
    params: SamplingParams, vocab_size: int, eos_token_ids: Collection[int] = ()
) -> None:
    """Raises ValueError, worded `field: what is wrong (what is allowed)`, for the first bad field.

    `eos_token_ids` lets it also refuse parameters under which no token could be chosen.
    """
    _integer("n", params.n, 1, MAX_CHOICES)
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, _INT32)
    _integer("min_tokens", params.min_tokens, 0, _INT32)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise ValueError(
            f"min_tokens: {params.min_tokens} is more than max_tokens ({params.max_tokens})"
        )
    _real("temperature", params.temperature, 0.0, 100.0)
    if 0.0 < params.temperature < MIN_TEMPERATURE:
        raise ValueError(
            f"temperature: {params.temperature} is too small (0, or at least {MIN_TEMPERATURE})"
        )
    if params.temperature == 0.0 and params.n > 1:
        raise ValueError("n: must be 1 when temperature is 0 (greedy choices would all be equal)")
    _real("top_p", params.top_p, 0.0, 1.0, open_below=True)
    _integer("top_k", params.top_k, -1, _INT32)
    _real("min_p", params.min_p, 0.0, 1.0)
    _real("repetition_penalty", params.repetition_penalty, 0.01, 100.0)
    _real("presence_penalty", params.presence_penalty, -2.0, 2.0)
    _real("frequency_penalty", params.frequency_penalty, -2.0, 2.0)
    if params.seed is not None:
        _integer("seed", params.seed, -_INT64 - 1, _INT64)
    if params.logprobs is not None:
        _integer("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    if params.prompt_logprobs is not None:
        _integer("prompt_logprobs", params.prompt_logprobs, 0, MAX_LOGPROBS)
    _count("logit_bias", params.logit_bias, MAX_LOGIT_BIAS)
    for token_id, bias in params.logit_bias.items():
        _token("logit_bias", token_id, vocab_size)
        _real("logit_bias", bias, -100.0, 100.0)
    _tokens("stop_token_ids", params.stop_token_ids, vocab_size, MAX_STOP_TOKENS)
    _count("bad_token_ids", params.bad_token_ids, MAX_BAD_SEQUENCES)
    for sequence in params.bad_token_ids:
        if not sequence:
            raise ValueError("bad_token_ids: an empty token sequence cannot be forbidden")
        _tokens("bad_token_ids", sequence, vocab_size, MAX_BAD_LENGTH)
    if params.allowed_token_ids is not None:
        _tokens("allowed_token_ids", params.allowed_token_ids, vocab_size, vocab_size)
    if params.grammar is not None:
        _check_grammar(params, params.grammar, eos_token_ids)
    _check_choosable(params, vocab_size, eos_token_ids)


def _check_grammar(
    params: SamplingParams, grammar: Grammar, eos_token_ids: Collection[int]
) -> None:
    """A grammar alone decides where the output may end and which tokens are left."""
    if not isinstance(grammar, Grammar):
        raise ValueError(f"grammar: {_shown(grammar)} is not a Grammar")
    if len(grammar.source) > MAX_GRAMMAR_CHARS:
        raise ValueError(
            f"grammar: {len(grammar.source)} characters are too many (at most {MAX_GRAMMAR_CHARS})"
        )
    if not eos_token_ids:
        raise ValueError("grammar: this model has no token to end an output with")
    for field, is_set in (
        ("min_tokens", params.min_tokens > 0),
        ("ignore_eos", params.ignore_eos),
        ("allowed_token_ids", params.allowed_token_ids is not None),
        ("bad_token_ids", bool(params.bad_token_ids)),
    ):
        if is_set:
            raise ValueError(f"{field}: cannot be combined with a grammar")


def _check_choosable(
    params: SamplingParams, vocab_size: int, eos_token_ids: Collection[int]
) -> None:
    """Some token must stay possible at every step, or a softmax would have nothing to sum."""
    if params.allowed_token_ids is not None:
        field, possible = "allowed_token_ids", set(params.allowed_token_ids)
    else:
        field, possible = "bad_token_ids", set(range(vocab_size)) if vocab_size <= 2048 else None
    if possible is None:  # the caps above leave most of a larger vocabulary
        return
    possible -= {sequence[0] for sequence in params.bad_token_ids if len(sequence) == 1}
    if not possible:
        raise ValueError(f"{field}: no token is left that may be chosen")
    if params.min_tokens > 0 and not possible - set(params.stop_token_ids) - set(eos_token_ids):
        raise ValueError("min_tokens: every token that may be chosen would stop the output")


def _integer(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{field}: {_shown(value)} is not an integer ({low} to {high})")
    if not low <= value <= high:
        raise ValueError(f"{field}: {_shown(value)} is out of range ({low} to {high})")


def _real(field: str, value: object, low: float, high: float, *, open_below: bool = False) -> None:
    allowed = f"{'more than ' if open_below else ''}{low:g} to {high:g}"
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{field}: {_shown(value)} is not a number ({allowed})")
    inside = (low < value if open_below else low <= value) and value <= high
    if not inside or not math.isfinite(value):
        raise ValueError(f"{field}: {_shown(value)} is out of range ({allowed})")


def _token(field: str, value: object, vocab_size: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{field}: {_shown(value)} is not a token id (0 to {vocab_size - 1})")
    if not 0 <= value < vocab_size:
        raise ValueError(
            f"{field}: token id {_shown(value)} is not in the vocabulary (0 to {vocab_size - 1})"
        )


def _tokens(field: str, values: Sequence[int], vocab_size: int, most: int) -> None:
    _count(field, values, most)
    for value in values:
        _token(field, value, vocab_size)


def _count(field: str, values: Sequence[object] | dict[int, float], most: int) -> None:
    if len(values) > most:
        raise ValueError(f"{field}: {len(values)} entries are too many (at most {most})")


def _shown(value: object) -> str:
    """`value`, short enough for one line."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "an integer of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
