"""One request's way through the engine: submit its prompts, turn token events into text deltas.

Knows nothing of HTTP or of reply shapes. Whoever stops reading, for whatever reason, aborts what
still runs: closing the generator closes the engine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, cast

from ..engine.client import EngineDeadError
from ..engine.messages import GenerateRequest, Logprobs, SamplingParams, TokenEvent
from ..engine.text import OutputText, StopStrings
from .errors import ApiError, bad_request, draining, engine_dead, internal
from .parity import GreedyOutput

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from ..engine.client import EngineClient
    from ..engine.text import TextTokenizer
    from .metrics import Metrics
    from .parity import ParityChecks
    from .prompts import Prompt

_log = logging.getLogger("convserve.server")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a request asks of the engine."""

    request_id: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    stops: Sequence[str]
    include_stop: bool
    skip_special_tokens: bool
    score_only: bool
    """The token made after the prompt is dropped; only the prompt was asked for."""
    priority: int
    cache_salt: str
    """Cached prefixes are shared only with requests of the same salt."""
    grammar_field: str | None = None
    """The request's field that `params.grammar` comes from."""

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params.n


@dataclasses.dataclass(slots=True, kw_only=True)
class Delta:
    """What is new of one choice."""

    index: int
    """prompt index * n + choice."""
    is_first: bool
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs | None]
    """None only for a prompt's first token."""
    offsets: list[int]
    """Where each token's text begins, in characters of the choice's output."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    """With the first delta of each choice, if asked for."""

    @classmethod
    def empty(cls, index: int) -> Delta:
        """One that says nothing, and is not the choice's first."""
        return cls(index=index, is_first=False, text="", token_ids=[], logprobs=[], offsets=[])


class _Choice:
    """Progress of one choice."""

    __slots__ = ("finished", "first_at", "index", "kept", "last_at", "num_tokens", "output")

    def __init__(self, index: int, output: OutputText) -> None:
        self.index = index
        self.output = output
        self.finished = False
        self.num_tokens = 0
        self.kept: list[int] = []
        self.first_at = 0.0
        self.last_at = 0.0


class Generation:
    """Runs one `Work`."""

    def __init__(
        self,
        work: Work,
        client: EngineClient,
        tokenizer: TextTokenizer,
        metrics: Metrics,
        arrived: float,
        parity: ParityChecks,
    ) -> None:
        """`arrived`: when the request was read, on `time.perf_counter`."""
        self._work = work
        self._client = client
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._arrived = arrived
        self._eos = frozenset(client.info.eos_token_ids)
        stops = StopStrings(work.stops) if work.stops else None
        self._choices = [
            _Choice(
                position * work.params.n + index,
                OutputText(
                    tokenizer,
                    stops=stops,
                    include_stop=work.include_stop,
                    skip_special_tokens=work.skip_special_tokens,
                    min_tokens=work.params.min_tokens,
                    prompt=prompt.token_ids,
                ),
            )
            for position, prompt in enumerate(work.prompts)
            for index in range(work.params.n)
        ]
        wants_check = not work.score_only and parity.wants(work.params)
        self._parity = parity if wants_check else None
        self._prompt_logprobs: dict[int, tuple[Logprobs | None, ...]] = {}
        self.num_choices = work.num_choices
        self.prompt_tokens = sum(len(prompt.token_ids) for prompt in work.prompts)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.queue_seconds: float | None = None
        """Longest wait of a prompt to be scheduled, and, as `prefill_seconds`, for its token."""
        self.prefill_seconds: float | None = None
        self.first_token_seconds: float | None = None
        self._text_seconds = 0.0
        self.trace_id: str | None = None
        """Of the trace that its latencies are examples of."""
        self.outcome = "abort"
        """`stop` or `length` of the choice that finished last; `error`, or `abort` till then."""

    @property
    def decode_seconds(self) -> float | None:
        """From first token to last of the choice that took longest; None before any token."""
        started = [choice for choice in self._choices if choice.first_at]
        return max((choice.last_at - choice.first_at for choice in started), default=None)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Yields until every choice has finished.

        Raises:
            ApiError: the engine died or failed the request.
        """
        metrics, params = self._metrics, self._work.params
        metrics.params_n.observe(params.n)
        if params.max_tokens is not None:
            metrics.params_max_tokens.observe(params.max_tokens)
        unfinished = len(self._choices)
        waiting: dict[int, list[TokenEvent]] = {}
        try:
            async with contextlib.aclosing(self._events()) as events:
                async for position, event in events:
                    for ready in self._in_order(position, event, waiting):
                        delta = self._advance(position, ready)
                        if delta is None:
                            continue
                        unfinished -= delta.finish_reason is not None
                        yield delta
                    if not unfinished:
                        break
            if unfinished:
                _log.error("%s: the engine ended it without a reason", self._work.request_id)
                raise internal(self._work.request_id)
        except EngineDeadError:
            self.outcome = "error"
            raise engine_dead() from None
        except ApiError:
            self.outcome = "error"
            raise
        finally:
            self._observe_end()

    def _in_order(
        self, position: int, event: TokenEvent, waiting: dict[int, list[TokenEvent]]
    ) -> list[TokenEvent]:
        """Holds a prompt's events back until its log-probabilities are here, if asked for."""
        if self._work.params.prompt_logprobs is None or position in self._prompt_logprobs:
            return [event]
        held = waiting.setdefault(position, [])
        held.append(event)
        if event.prompt_logprobs is None and event.finish_reason not in ("error", "abort"):
            return []
        if event.prompt_logprobs is not None:
            self._prompt_logprobs[position] = event.prompt_logprobs
        return waiting.pop(position)

    def _events(self) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        work = self._work
        requests = [
            GenerateRequest(
                request_id=f"{work.request_id}-{position}",
                prompt=prompt.token_ids,
                params=work.params,
                priority=work.priority,
                cache_salt=work.cache_salt,
            )
            for position, prompt in enumerate(work.prompts)
        ]
        if len(requests) == 1:
            return self._single(requests[0])
        return self._merged(requests)

    async def _single(
        self, request: GenerateRequest
    ) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        async with contextlib.aclosing(self._submit(request)) as events:
            async for event in events:
                yield 0, event

    def _submit(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        return cast("AsyncGenerator[TokenEvent, None]", self._client.submit(request))

    async def _merged(
        self, requests: Sequence[GenerateRequest]
    ) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        queue: asyncio.Queue[tuple[int, TokenEvent | Exception | None]] = asyncio.Queue()

        async def forward(position: int, request: GenerateRequest) -> None:
            last: Exception | None = None
            try:
                async with contextlib.aclosing(self._submit(request)) as events:
                    async for event in events:
                        queue.put_nowait((position, event))
            except Exception as error:  # handed on to the reader, who raises it
                last = error
            queue.put_nowait((position, last))

        tasks = [
            asyncio.create_task(forward(position, request))
            for position, request in enumerate(requests)
        ]
        try:
            running = len(tasks)
            while running:
                position, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield position, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _advance(self, position: int, event: TokenEvent) -> Delta | None:
        """Takes one event of one prompt; None if nothing of it is to be told."""
        work = self._work
        choice = self._choices[position * work.params.n + event.index]
        if choice.finished:
            return None
        if event.finish_reason in ("error", "abort"):
            raise self._failure(event)
        now = time.perf_counter()
        is_first = choice.first_at == 0.0
        if is_first:
            choice.first_at = now
            self._observe_first(position, event, now)
        if work.score_only:
            choice.finished = True
            choice.last_at = now
            self.outcome = "length"
            self._metrics.finished["length"].inc()
            return Delta(
                index=choice.index,
                is_first=True,
                text="",
                token_ids=[],
                logprobs=[],
                offsets=[],
                finish_reason="length",
                prompt_logprobs=self._prompt_logprobs.get(position),
            )
        delta = self._decode(choice, event)
        self._text_seconds += time.perf_counter() - now
        delta.is_first = is_first
        if is_first:
            delta.prompt_logprobs = self._prompt_logprobs.get(position)
        elif delta.token_ids:
            count = len(delta.token_ids)
            self._metrics.inter_token_latency.observe((now - choice.last_at) / count, count)
        choice.last_at = now
        choice.num_tokens += len(delta.token_ids)
        self.completion_tokens += len(delta.token_ids)
        if self._parity is not None:
            choice.kept += delta.token_ids
        if delta.finish_reason is not None:
            choice.finished = True
            self.outcome = delta.finish_reason
            self._metrics.finished[delta.finish_reason].inc()
            if event.finish_reason is None:
                self._client.abort(event.request_id, event.index)
            if self._parity is not None:
                prompt = work.prompts[position].token_ids
                self._parity.offer(
                    GreedyOutput(event.request_id, prompt, choice.kept, work.cache_salt)
                )
        return delta

    def _decode(self, choice: _Choice, event: TokenEvent) -> Delta:
        output = choice.output
        delta = Delta.empty(choice.index)
        last = len(event.token_ids) - 1
        for place, token_id in enumerate(event.token_ids):
            delta.token_ids.append(token_id)
            delta.offsets.append(output.num_chars)
            if event.logprobs:
                delta.logprobs.append(event.logprobs[place])
            ends = place == last and event.finish_reason == "stop"
            hidden = (
                ends
                and not self._work.include_stop
                and (token_id == event.stop_token or token_id in self._eos)
            )
            delta.text += output.push(token_id, hidden=hidden)
            if output.stop is not None:
                break
        else:
            if event.finish_reason is not None:
                delta.text += output.finish()
                delta.finish_reason = event.finish_reason
                delta.stop_reason = event.stop_token
        if output.stop is not None:
            delta.finish_reason = "stop"
            delta.stop_reason = output.stop
        return delta

    def _failure(self, event: TokenEvent) -> ApiError:
        if event.finish_reason == "abort":
            return draining()
        field, _, what = (event.error or "").partition(": ")
        if field == "grammar" and self._work.grammar_field is not None:
            return bad_request(self._work.grammar_field, what)
        _log.error("%s: the engine failed it: %s", self._work.request_id, event.error)
        return internal(self._work.request_id)

    def _observe_first(self, position: int, event: TokenEvent, now: float) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._arrived
            self._metrics.time_to_first_token.observe_traced(
                self.first_token_seconds, self.trace_id
            )
        if event.index == 0:
            self.cached_tokens += event.num_cached_tokens
            self._metrics.cached_tokens.inc(event.num_cached_tokens)
            self._metrics.computed_tokens.observe(
                len(self._work.prompts[position].token_ids) - event.num_cached_tokens
            )
            self.queue_seconds = max(self.queue_seconds or 0.0, event.queue_seconds)
            self.prefill_seconds = max(self.prefill_seconds or 0.0, event.prefill_seconds)
            self._metrics.queue_time.observe(event.queue_seconds)
            self._metrics.prefill_time.observe(event.prefill_seconds)

    def _observe_end(self) -> None:
        metrics, now = self._metrics, time.perf_counter()
        metrics.detokenise_seconds.inc(self._text_seconds)
        for choice in self._choices:
            if not choice.finished:
                metrics.finished["error" if self.outcome == "error" else "abort"].inc()
            elif choice.num_tokens:
                decode = choice.last_at - choice.first_at
                metrics.decode_time.observe(decode)
                metrics.inference_time.observe((self.prefill_seconds or 0.0) + decode)
                metrics.generation_tokens.observe(choice.num_tokens)
                if choice.num_tokens > 1:
                    metrics.time_per_output_token.observe(decode / (choice.num_tokens - 1))
        if any(not choice.finished for choice in self._choices):
            if self.outcome != "error":
                self.outcome = "abort"
            return
        metrics.e2e_latency.observe_traced(now - self._arrived, self.trace_id)
        for prompt in self._work.prompts:
            metrics.prompt_tokens.observe(len(prompt.token_ids))
