"""What crosses the wall between the server and the engine: plain data, schema-checked msgpack.

Nothing here knows about tensors, HTTP or text. Every struct is decoded with its type, so a
malformed frame is an error at the boundary, not a surprise behind it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class Grammar(msgspec.Struct, frozen=True):
    """What the whole text of an output must be."""

    kind: Literal["json_schema", "regex", "lark", "gbnf"]
    source: str
    """A JSON schema as JSON, a regular expression, a grammar in llguidance's dialect of Lark, or
    one in llama.cpp's of EBNF."""


JSON_WHITESPACE = r"(\r?\n[ \t]{0,32}| )?"
"""Between the parts of a JSON text that follows a schema: nothing, a space, or a new line and its
indentation. A small model that may goes on with spaces for ever."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens of one request are chosen and when it ends.

    `sampling_checks.check_sampling` names the first field that is out of range.
    """

    n: int = 1
    """Independent continuations of the prompt; they share its pages."""
    max_tokens: int | None = None
    """Most tokens to generate; None for as many as the context holds."""
    min_tokens: int = 0
    """eos and stop tokens cannot be chosen before this many."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output; > 1 discourages."""
    presence_penalty: float = 0.0
    """Over output."""
    frequency_penalty: float = 0.0
    """Over output."""
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    """Same seed, prompt and index: same tokens, whatever else is in the batch."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    allowed_token_ids: tuple[int, ...] | None = None
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that must not appear in the output."""
    grammar: Grammar | None = None
    """What the text of the output must be; the output ends where the grammar does."""
    logprobs: int | None = None
    """Log-probabilities of each chosen token and of this many best ones."""
    prompt_logprobs: int | None = None
    """The same for each prompt token given the ones before it."""


class GenerateRequest(msgspec.Struct, frozen=True, tag="generate", kw_only=True):
    """One prompt to continue."""

    request_id: str
    """Unique among live requests; made by the server, never by a client."""
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    """Lower runs sooner."""
    cache_salt: str = ""
    """Prefixes are shared only with requests of the same salt."""


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request (every choice of it, or one) and free what it holds within a step.

    An abort needs no answer and gets no event: whoever aborts has stopped listening.
    """

    request_id: str
    index: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave the loop at once; in-flight requests end with `abort`."""


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """Forget every cached prefix that no running request owns."""


EngineCommand = GenerateRequest | AbortRequest | ResetPrefixCache | Shutdown


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of one token and of its best rivals, all from the same numbers."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...] = ()
    """(token id, log-probability) of the k best, best first."""


class TokenEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one choice of one request."""

    request_id: str
    index: int
    """Choice, 0 .. n-1."""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    """One per token when asked for."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token that ended the choice, if one of `stop_token_ids` did (None for eos)."""
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    """With the first event of index 0 when asked for; the first entry is None."""
    num_cached_tokens: int = 0
    """Prompt tokens whose state came from the prefix cache."""
    error: str | None = None
    """Why, when finish_reason is `error`."""
    queue_seconds: float = 0.0
    """First event: time from arrival in the engine to first being scheduled."""
    prefill_seconds: float = 0.0
    """First event: time from first being scheduled to the first token."""


class Times(msgspec.Struct, frozen=True, array_like=True):
    """A histogram since the engine started."""

    counts: tuple[int, ...] = ()
    """By bin; bin i ends with the i-th of `EngineInfo.page_time_edges`, the last one nowhere."""
    seconds: float = 0.0
    """Sum of all times."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges now, and counters since the engine started."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_used: int = 0
    """Owned by running sequences."""
    pages_kept: int = 0
    """Pages that nobody owns and whose contents wait to be shared."""
    slots_total: int = 0
    slots_used: int = 0
    tails_total: int = 0
    tails_stored: int = 0
    """Conv windows stored at page boundaries."""
    tails_evicted: int = 0
    prefix_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    prefix_hits: int = 0
    """Prompt tokens found there."""
    replayed_tokens: int = 0
    """Tokens run again to rebuild their conv windows."""
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0
    """Rows of the last step."""
    step_sequences: int = 0
    """Sequences that advanced in it."""
    step_seconds: float = 0.0
    """Duration of the last step."""
    scheduler_seconds: float = 0.0
    """Planning and committing of the last step."""
    step_seconds_total: float = 0.0
    graph_replays: dict[int, int] = {}
    """Steps that replayed a captured graph, by the graph's rows."""
    padding_tokens: int = 0
    """Rows of those graphs that belonged to nobody."""
    gpu_idle_seconds: float = 0.0
    """Time that a GPU stood idle while there was work."""
    corrupted_requests: int = 0
    """Sequences that ended because their logits were not finite."""
    page_lifetimes: Times = Times()
    """Of pages of cached prefixes: full to evicted."""
    page_idle_times: Times = Times()
    """Last use to eviction."""
    page_reuse_gaps: Times = Times()
    """Last use to being shared once more."""


class StepReport(msgspec.Struct, frozen=True, tag="step"):
    """Everything one engine step produced."""

    events: tuple[TokenEvent, ...]
    stats: EngineStats


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent every second when there is nothing else to say."""

    stats: EngineStats


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """What the engine is, once it can take requests."""

    model: str
    """The folder served."""
    model_type: str
    vocab_size: int
    max_model_len: int
    """Most tokens of prompt and output together."""
    max_num_seqs: int
    page_size: int
    num_pages: int
    page_time_edges: tuple[float, ...] = ()
    """Seconds: the bins of `EngineStats.page_lifetimes` and its like."""
    num_tails: int = 0
    """Places for conv windows at page boundaries."""
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    kv_bytes_per_token: int
    conv_bytes_per_sequence: int
    recurrent_bytes_per_sequence: int = 0
    page_pool_bytes: int
    weight_bytes: int
    replay_length: int | None
    conv: str
    """One phrase: kind, width and placement, or `none`."""


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start: one line naming the tensor, key or file."""

    message: str


EngineReply = EngineInfo | EngineFailed | StepReport | Heartbeat
