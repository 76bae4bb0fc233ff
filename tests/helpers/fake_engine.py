"""A scripted engine for tests of the server: says given tokens, one step at a time, and can die.

It sits behind the real `RequestStreams`, so aborts, closing and death behave as they do with a
real engine; only the model and the scheduler are made up.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from convserve.engine.messages import (
    AbortRequest,
    EngineCommand,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Logprobs,
    ResetPrefixCache,
    StepReport,
    TokenEvent,
)
from convserve.engine.streams import RequestStreams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

EOS = 257
VOCAB = 259
INFO = EngineInfo(
    model="/secret/folder/tiny",
    model_type="llama",
    vocab_size=VOCAB,
    max_model_len=256,
    max_num_seqs=4,
    page_size=16,
    num_pages=64,
    eos_token_ids=(EOS,),
    device="cpu",
    dtype="float32",
    kv_bytes_per_token=1024,
    conv_bytes_per_sequence=4096,
    page_pool_bytes=1 << 20,
    weight_bytes=1 << 20,
    replay_length=None,
    conv="none",
)


def fake_logprobs(token_id: int, k: int) -> Logprobs:
    """The token is the best of k, each a tenth less likely than the one before."""
    top = tuple(((token_id + i) % VOCAB, -0.5 - 0.1 * i) for i in range(k))
    return Logprobs(token_id, -0.5, 1, top)


class _Running:
    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.said = [0] * request.params.n
        self.open = set(range(request.params.n))


class FakeEngine:
    """An `EngineClient`. Choice i of a request says `outputs[i]`, then eos."""

    def __init__(
        self,
        *outputs: str | bytes | Sequence[int],
        auto: bool = True,
        tokens_per_step: int = 1,
        cached: int = 0,
        die_after: int | None = None,
    ) -> None:
        """`auto` steps by itself; else a test calls `step`. Text is said byte by byte. The engine
        dies after `die_after` steps."""
        said = outputs or ("hello world",)
        self.outputs = [list(o.encode()) if isinstance(o, str) else list(o) for o in said]
        self.auto = auto
        self.tokens_per_step = tokens_per_step
        self.cached = cached
        self.die_after = die_after
        self.submitted: list[GenerateRequest] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.resets = 0
        self.fail_with: str | None = None
        self.age = 0.0
        self.totals = EngineStats()
        self._running: dict[str, _Running] = {}
        self._dead: asyncio.Event = asyncio.Event()
        self._streams = RequestStreams(INFO, self._take)
        self._stepper: asyncio.Handle | None = None

    info = INFO

    @property
    def stats(self) -> EngineStats:
        return self.totals

    @property
    def is_alive(self) -> bool:
        return self._streams.is_alive

    @property
    def heartbeat_age(self) -> float:
        return self.age

    @property
    def live(self) -> int:
        """Requests that hold something."""
        return len(self._running)

    def submit(self, request: GenerateRequest) -> AsyncGenerator[TokenEvent, None]:
        return self._streams.submit(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._streams.abort(request_id, index)

    def reset_prefix_cache(self) -> None:
        self._streams.reset_prefix_cache()

    def watch_stats(self, watch: Callable[[EngineStats], None]) -> None:
        self._streams.watch_stats(watch)

    async def wait_dead(self) -> int | None:
        await self._dead.wait()
        return 1

    async def close(self) -> None:
        self._running.clear()
        self._streams.end_streams()
        self._dead.set()

    def die(self) -> None:
        """As if the process was killed."""
        self._running.clear()
        self._streams.die("killed")
        self._dead.set()

    def step(self) -> None:
        """One token (or `tokens_per_step`) for every open choice."""
        events: list[TokenEvent] = []
        for running in list(self._running.values()):
            for index in sorted(running.open):
                event = self._say(running, index)
                events.append(event)
                if event.finish_reason is not None:
                    running.open.discard(index)
            if not running.open:
                del self._running[running.request.request_id]
        self._streams.receive(StepReport(tuple(events), self.stats))
        if self.die_after is not None:
            self.die_after -= 1
            if self.die_after == 0:
                self.die()

    def _take(self, command: EngineCommand) -> None:
        if isinstance(command, GenerateRequest):
            self.submitted.append(command)
            self._running[command.request_id] = _Running(command)
            self._schedule()
        elif isinstance(command, ResetPrefixCache):
            self.resets += 1
        elif isinstance(command, AbortRequest):
            self.aborted.append((command.request_id, command.index))
            running = self._running.get(command.request_id)
            if running is not None:
                running.open -= running.open if command.index is None else {command.index}
                if not running.open:
                    del self._running[command.request_id]

    def _schedule(self) -> None:
        if self.auto and self._stepper is None:
            self._stepper = asyncio.get_running_loop().call_soon(self._auto_step)

    def _auto_step(self) -> None:
        self._stepper = None
        if self.is_alive and self._running:
            self.step()
            self._schedule()

    def _say(self, running: _Running, index: int) -> TokenEvent:
        request, params = running.request, running.request.params
        said = running.said[index]
        if self.fail_with is not None:
            return TokenEvent(
                request.request_id, index, finish_reason="error", error=self.fail_with
            )
        output = [*self.outputs[index % len(self.outputs)], EOS]
        tokens = output[said : said + self.tokens_per_step]
        if params.max_tokens is not None:
            tokens = tokens[: params.max_tokens - said]
        running.said[index] += len(tokens)
        finish, stop_token = None, None
        for place, token in enumerate(tokens):
            if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
                tokens = tokens[: place + 1]
                finish = "stop"
                stop_token = None if token == EOS else token
                break
        else:
            if running.said[index] == params.max_tokens or running.said[index] == len(output):
                finish = "length"
        wanted, first = params.logprobs, said == 0
        prompt_logprobs = None
        if first and index == 0 and params.prompt_logprobs is not None:
            count = params.prompt_logprobs
            prompt_logprobs = (None, *(fake_logprobs(t, count) for t in request.prompt[1:]))
        return TokenEvent(
            request_id=request.request_id,
            index=index,
            token_ids=tuple(tokens),
            logprobs=() if wanted is None else tuple(fake_logprobs(t, wanted) for t in tokens),
            finish_reason=finish,
            stop_token=stop_token,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.cached if first else 0,
            queue_seconds=0.001,
            prefill_seconds=0.002,
        )
