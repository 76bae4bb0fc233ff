"""One continuation of one prompt: its tokens, how far its state reaches, and when it ends.

Only the scheduler writes a Sequence; everybody else reads.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from ..cache.pools import SequenceId

if TYPE_CHECKING:
    from .messages import FinishReason, GenerateRequest, Logprobs, SamplingParams


class Status(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """A prompt and what has been generated after it."""

    id: SequenceId
    request_id: str
    index: int
    """Choice of the request, 0 .. n-1."""
    params: SamplingParams
    tokens: list[int]
    """Prompt, then output."""
    prompt_len: int
    max_len: int
    """Ends with `length` at this many tokens."""
    seed: int
    """Of this choice's random numbers; one 64-bit number whether or not the user gave a seed."""
    priority: int
    salt: str
    """Prefixes are shared only with sequences of the same salt."""
    arrival: int
    """Order of arrival in the engine."""
    arrived_at: float
    """time.monotonic() at arrival."""

    ends: frozenset[int] = frozenset()
    """Tokens that end it with `stop`."""
    num_computed: int = 0
    """Tokens whose state the steps planned so far leave in the cache; 0 again after a
    preemption."""
    num_in_flight: int = 0
    """Tokens after `tokens` that planned steps choose and that are not known yet."""
    num_cached: int = 0
    """Prompt tokens whose state came from the prefix cache."""
    status: Status = Status.WAITING
    forks: list[Sequence] = field(default_factory=list)
    """Other choices of the request, waiting to share this one's prompt."""
    prompt_logprobs: list[Logprobs | None] | None = None
    """Filled from the front as prompt rows are computed, when asked for."""
    first_scheduled_at: float | None = None
    has_reported: bool = False
    """Its first event has been sent."""
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens it has, those in flight included."""
        return len(self.tokens) + self.num_in_flight

    @property
    def num_pending(self) -> int:
        """Tokens not computed by any planned step: the rows it would like to advance."""
        return self.length - self.num_computed

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def rank(self) -> tuple[int, int]:
        """Order of service: priority, then arrival. The largest is preempted first."""
        return (self.priority, self.arrival)

    @property
    def num_to_score(self) -> int:
        """Prompt rows from num_computed on whose next token's log-probability is still wanted."""
        if self.prompt_logprobs is None:
            return 0
        # Row p scores token p + 1, and entry 0 (no token before it) is there from the start.
        scored = len(self.prompt_logprobs) - 1
        return max(0, self.prompt_len - 1 - max(scored, self.num_computed))


def new_sequence(
    request: GenerateRequest, index: int, number: int, max_model_len: int, eos: frozenset[int]
) -> Sequence:
    """One choice of a request, waiting.

    Args:
        number: new for every sequence, and larger for later ones.
        eos: what ends it, unless the request says otherwise.
    """
    params, prompt_len = request.params, len(request.prompt)
    max_len = max_model_len
    if params.max_tokens is not None:
        max_len = min(max_len, prompt_len + params.max_tokens)
    return Sequence(
        id=SequenceId(number),
        request_id=request.request_id,
        index=index,
        params=params,
        tokens=list(request.prompt),
        prompt_len=prompt_len,
        max_len=max_len,
        ends=frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos),
        seed=params.seed if params.seed is not None else random.getrandbits(64),
        priority=request.priority,
        salt=request.cache_salt,
        arrival=number,
        arrived_at=time.monotonic(),
    )
