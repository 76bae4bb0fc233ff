"""Looks for silent corruption of state: greedy outputs are scored again from nothing.

A greedy output is a claim: each of its tokens is the most probable one after those before it. The
engine made it step by step, from cached prefixes, rings and pages that others come and go in; here
it reads prompt and output again in one piece, with no cached prefix, and the claim is compared with
what it says then. Knows nothing of how replies are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import TYPE_CHECKING, NamedTuple

from ..engine.client import EngineDeadError
from ..engine.messages import GenerateRequest, Logprobs, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..engine.client import EngineClient
    from .metrics import Metrics

_log = logging.getLogger("convserve.server")
_LOWEST_PRIORITY = 2**31
"""Behind every client's."""
_LOOK_SECONDS = 0.05
TOLERANCES = {"bfloat16": 0.5, "float16": 0.1, "float32": 1e-3, "float64": 1e-6}
"""How far below the best, in nats, a chosen token may come out, by the model's dtype.

A decode step and a chunk add in different orders, so where two tokens are nearly equal either may
win. Logits of 16 to 32 lie 1/8 apart in bfloat16 and 1/64 apart in float16: two logits that are
each off by two such steps make 1/2 and 1/16. In float32 it is the sums over thousands of terms that
differ, by about 1e-4."""


class GreedyOutput(NamedTuple):
    """One greedy output and where it came from."""

    request_id: str
    prompt: tuple[int, ...]
    token_ids: list[int]
    cache_salt: str


def is_checkable(params: SamplingParams) -> bool:
    """Whether every token is the model's own first choice, with nothing added or forbidden."""
    plain = SamplingParams()
    return params.temperature == 0 and all(
        getattr(params, name) == getattr(plain, name)
        for name in (
            "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
            "min_tokens", "allowed_token_ids", "bad_token_ids", "grammar",
        )
    )  # fmt: skip


class ParityChecks:
    """Checks some outputs, one at a time, while nobody waits."""

    def __init__(
        self,
        client: EngineClient,
        metrics: Metrics,
        rate: float,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """`rate`: the share of greedy requests to check, 0..1; `draw` decides in [0, 1)."""
        self._client = client
        self._metrics = metrics
        self._rate = rate
        self._draw = draw
        self._tolerance = TOLERANCES.get(client.info.dtype, TOLERANCES["bfloat16"])
        self._running: asyncio.Task[None] | None = None

    def wants(self, params: SamplingParams) -> bool:
        """Whether the outputs of a request that begins now are to be offered."""
        return bool(self._rate) and is_checkable(params) and self._draw() < self._rate

    def offer(self, output: GreedyOutput) -> None:
        """Starts to check an output, unless another is being checked or somebody waits."""
        if self._running is not None or self._client.stats.waiting:
            self._metrics.parity_skipped.inc()
            return
        self._running = asyncio.create_task(self._check(output))
        self._running.add_done_callback(self._done)

    async def close(self) -> None:
        """Gives up a check that is running."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    def _done(self, _: asyncio.Task[None]) -> None:
        self._running = None

    async def _check(self, output: GreedyOutput) -> None:
        scoring = asyncio.create_task(self._score(output))
        try:
            while not scoring.done():
                await asyncio.wait({scoring}, timeout=_LOOK_SECONDS)
                if self._client.stats.waiting:
                    break
            if not scoring.done():
                self._metrics.parity_skipped.inc()
                return
            with contextlib.suppress(EngineDeadError):
                scores = scoring.result()
                if scores is not None:
                    self._compare(output, scores)
        finally:
            scoring.cancel()
            await asyncio.gather(scoring, return_exceptions=True)

    async def _score(self, output: GreedyOutput) -> Sequence[Logprobs | None] | None:
        """What the engine says of each token of prompt and output, or None if it fails."""
        tokens = (*output.prompt, *output.token_ids)[: self._client.info.max_model_len - 1]
        request = GenerateRequest(
            request_id=f"{output.request_id}-parity",
            prompt=tokens,  # one that is scored takes nothing from the prefix cache
            params=SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1),
            priority=_LOWEST_PRIORITY,
            cache_salt=output.cache_salt,
        )
        scores = None
        async for event in self._client.submit(request):
            scores = event.prompt_logprobs or scores
        return scores

    def _compare(self, output: GreedyOutput, scores: Sequence[Logprobs | None]) -> None:
        self._metrics.parity_checks.inc()
        wrong = [
            (position, score)
            for position, score in enumerate(scores[len(output.prompt) :])
            if score is not None and not _below_best(score) <= self._tolerance  # nor is a NaN
        ]
        if not wrong:
            return
        self._metrics.parity_mismatches.inc()
        position, score = wrong[0]
        _log.error(
            "%s: token %d of the output (id %d) is %.4g nats below the best (id %d) when the same "
            "text is read again; so are %d of %d tokens (more than %g)",
            output.request_id,
            position,
            score.token_id,
            _below_best(score),
            score.top[0][0],
            len(wrong),
            len(output.token_ids),
            self._tolerance,
        )


def _below_best(score: Logprobs) -> float:
    return score.top[0][1] - score.logprob
