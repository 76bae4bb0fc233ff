"""A request's sampling fields, over the model's defaults, as the engine's `SamplingParams`.

Knows nothing of prompts' text or of replies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from ..engine.messages import EngineInfo, SamplingParams
from ..engine.sampling_checks import MIN_TEMPERATURE, check_sampling
from .errors import bad_request, from_value_error
from .protocol import ChatRequest, CompletionRequest, GenerationFields
from .settings import MAX_BAD_WORD_CHARS, MAX_BAD_WORDS, MAX_STOP_CHARS, MAX_STOPS

if TYPE_CHECKING:
    from pathlib import Path

    from ..engine.text import TextTokenizer
    from .structured import Structure

N = TypeVar("N", int, float)

_COMPLETION_TOKENS = 16
"""OpenAI's default of max_tokens for completions; chat has none."""


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What generation_config.json says; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None

    @classmethod
    def from_folder(cls, folder: Path) -> GenerationDefaults:
        """Reads `folder`/generation_config.json; a missing file says nothing.

        Raises:
            ValueError: one line naming the file and the key.
        """
        path = folder / "generation_config.json"
        try:
            defaults = msgspec.json.decode(path.read_bytes(), type=cls)
            _check_defaults(defaults)
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        return defaults


def _check_defaults(defaults: GenerationDefaults) -> None:
    given = {
        ("max_tokens" if name == "max_new_tokens" else name): value
        for name, value in msgspec.structs.asdict(defaults).items()
        if value is not None
    }
    if 0.0 < given.get("temperature", 0.0) < MIN_TEMPERATURE:
        given["temperature"] = 0.0
    check_sampling(SamplingParams(**given), vocab_size=1)


def sampling_params(
    request: CompletionRequest | ChatRequest,
    defaults: GenerationDefaults,
    info: EngineInfo,
    tokenizer: TextTokenizer,
    structure: Structure | None,
) -> SamplingParams:
    """The engine's parameters of `request`, in range; its `max_tokens` is None where nobody said.

    A max_tokens of 0 (with echo) becomes 1: the engine scores a prompt while it makes a token.

    Raises:
        ApiError: 400 naming the field.
    """
    logprobs, prompt_logprobs = _logprobs(request)
    max_tokens = _max_tokens(request, defaults)
    temperature = _pick(request.temperature, defaults.temperature, 1.0)
    params = SamplingParams(
        n=request.n,
        max_tokens=1 if is_score_only(request) else max_tokens,
        min_tokens=request.min_tokens,
        # so near to greedy that dividing by it would overflow
        temperature=0.0 if 0.0 < temperature < MIN_TEMPERATURE else temperature,
        top_p=_pick(request.top_p, defaults.top_p, 1.0),
        top_k=_pick(request.top_k, defaults.top_k, 0),
        min_p=_pick(request.min_p, defaults.min_p, 0.0),
        repetition_penalty=_pick(request.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request.logit_bias),
        seed=request.seed,
        stop_token_ids=tuple(request.stop_token_ids),
        ignore_eos=request.ignore_eos,
        allowed_token_ids=(
            None if request.allowed_token_ids is None else tuple(request.allowed_token_ids)
        ),
        bad_token_ids=_bad_words(request.bad_words, tokenizer),
        grammar=None if structure is None else structure.grammar,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
    try:
        check_sampling(params, info.vocab_size, info.eos_token_ids)
    except ValueError as error:
        raise from_value_error(_in_request_terms(error, request, structure)) from None
    return params


def _in_request_terms(
    error: ValueError, request: CompletionRequest | ChatRequest, structure: Structure | None
) -> ValueError:
    """`error` naming the field that the client wrote."""
    field, separator, what = str(error).partition(": ")
    names = {"bad_token_ids": "bad_words"}
    if structure is not None:
        names["grammar"] = structure.field
        what = what.replace("a grammar", structure.field)
    if isinstance(request, ChatRequest):
        names["logprobs"] = "top_logprobs"
        if request.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
    return ValueError(names.get(field, field) + separator + what)


def is_score_only(request: CompletionRequest | ChatRequest) -> bool:
    """Whether only the prompt is wanted back."""
    return isinstance(request, CompletionRequest) and request.max_tokens == 0


def stop_strings(request: GenerationFields) -> list[str]:
    """The stop strings of `request`; raises ApiError 400."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop
    if len(stops) > MAX_STOPS:
        raise bad_request("stop", f"{len(stops)} strings are too many (at most {MAX_STOPS})")
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise bad_request(
                "stop", f"a string of {len(stop)} characters (1 to {MAX_STOP_CHARS} are allowed)"
            )
    return stops


def _max_tokens(
    request: CompletionRequest | ChatRequest, defaults: GenerationDefaults
) -> int | None:
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            return request.max_completion_tokens
        return defaults.max_new_tokens if request.max_tokens is None else request.max_tokens
    if request.max_tokens == 0 and not request.echo:
        raise bad_request("max_tokens", "0 is only allowed with echo")
    return _pick(request.max_tokens, defaults.max_new_tokens, _COMPLETION_TOKENS)


def _logprobs(request: CompletionRequest | ChatRequest) -> tuple[int | None, int | None]:
    """(logprobs, prompt_logprobs) for the engine."""
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs", "is not available in a stream")
    if isinstance(request, ChatRequest):
        if request.top_logprobs is not None and not request.logprobs:
            raise bad_request("top_logprobs", "needs logprobs to be true")
        return (request.top_logprobs or 0) if request.logprobs else None, request.prompt_logprobs
    wanted = request.prompt_logprobs
    if request.echo and request.logprobs is not None:
        wanted = max(request.logprobs, wanted or 0)
    return request.logprobs, wanted


def _logit_bias(given: dict[str, float]) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise bad_request("logit_bias", "a key is not a token id")
        bias[int(key)] = value
    return bias


def _bad_words(words: list[str], tokenizer: TextTokenizer) -> tuple[tuple[int, ...], ...]:
    """Token sequences of each word, at the start of a text and after a space."""
    if len(words) > MAX_BAD_WORDS:
        raise bad_request("bad_words", f"{len(words)} are too many (at most {MAX_BAD_WORDS})")
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.strip()
        if not bare or len(word) > MAX_BAD_WORD_CHARS:
            raise bad_request(
                "bad_words", f"a word must have 1 to {MAX_BAD_WORD_CHARS} characters besides spaces"
            )
        for text in (bare, f" {bare}"):
            sequences[tuple(tokenizer.encode(text, add_special_tokens=False))] = None
    sequences.pop((), None)
    return tuple(sequences)


def _pick(asked: N | None, default: N | None, otherwise: N) -> N:
    if asked is not None:
        return asked
    return otherwise if default is None else default
