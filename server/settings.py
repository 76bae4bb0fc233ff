"""What an operator decides about the HTTP side, and the bounds on what one request may ask.

Knows nothing of flags (cli.py reads those) or of the engine's own options.
"""

from __future__ import annotations

import msgspec

MAX_PROMPTS = 256
"""Prompts in one request."""
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_CACHE_SALT_CHARS = 128
MAX_MESSAGES = 4096
MAX_HEADER_BYTES = 32 * 1024
MAX_URL_BYTES = 8 * 1024
MAX_TEMPLATE_KWARGS = 16
MAX_METADATA = 16
MAX_TOOLS = 128
MAX_OUTPUT_CHOICES = 1024
MAX_GRAMMAR_CHECKS = 64
"""Requests that may wait for their grammar to be checked; more get 429."""
GRAMMAR_SECONDS = 5.0
"""Time for what a client wants its output to be (a schema, an expression) to compile."""


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the server answers; immutable."""

    model_names: tuple[str, ...]
    """Names the model is served under; the first one is shown."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens every route; none leaves the server open."""
    metrics_need_key: bool = True
    """Whether /metrics wants a key, where there are keys."""
    max_queue: int = 1024
    """Sequences that may wait beyond those that can run; more get 429."""
    max_body: int = 4 * 1024 * 1024
    """Bytes of a request body; more get 413."""
    body_seconds: float = 60.0
    """Time for a body to arrive; later gets 408."""
    keep_alive_seconds: float = 15.0
    """Silence after which a stream sends a comment; 0 for never."""
    send_seconds: float = 60.0
    """Time a client may leave a stream unread before it is dropped."""
    deadline_seconds: float = 0.0
    """Time for a whole request; 0 for any."""
    stale_seconds: float = 60.0
    """Silence of the engine after which /health fails."""
    vllm_metrics: bool = True
    """Whether /metrics repeats its figures under vLLM's names."""
    parity_check: float = 0.0
    """Share of greedy requests whose output is scored again from nothing, 0..1."""
    page: bool = True
    """Whether `/` serves the page; it wants no key, what it then asks for does."""
    otlp_traces_endpoint: str | None = None
    """Where OpenTelemetry traces go; none are made without it."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call this server; none by default."""
