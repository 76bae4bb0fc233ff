"""The engine's step: plan, build, run, sample, commit. Read this file first.

An EngineCore is driven by whoever owns it (a process loop, a thread, the offline `LLM`): requests
are added between steps and every step returns the events it produced.

On a device steps overlap: a step is planned and launched while the one before it still runs, and
only then are that one's tokens read. The device feeds them to the step after; the host samples a
step's logits once it knows every token before them, so that stop conditions, penalties, seeds and
reports are what they are without overlap.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..cache import CacheManager, CacheStorage
from .batch_builder import BatchBuilder
from .grammar_gate import GrammarGate
from .idle import IdleClock
from .messages import EngineStats, Times
from .runner import Model, Runner
from .sampler import Choices, Sampler
from .scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cache import residence
    from .grammar import Grammars
    from .messages import GenerateRequest, TokenEvent
    from .output import Output
    from .plan import StepPlan
    from .resolve import Limits


@dataclass
class _Flight:
    """A step that was launched and whose tokens were not read yet."""

    plan: StepPlan
    output: Output
    choices: Choices | None = None


class EngineCore:
    """A model, its cache and its scheduler."""

    def __init__(
        self,
        model: Model,
        limits: Limits,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        prefix_caching: bool = True,
        overlap: bool = True,
        graphs: bool = True,
        poison: bool = False,
        grammars: Grammars | None = None,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Allocates the cache and prepares the model's steps.

        Args:
            overlap: launch a step before the tokens of the one before it are read.
            graphs: replay captured graphs where the device has them.
            poison: fill the cache with NaN (tests).
            grammars: of the model's tokenizer; without them, requests with a grammar fail.
            on_progress: called with (graphs captured, graphs in all).
        """
        self.limits = limits
        self._cache = CacheManager(
            limits.sizes,
            replay_length=model.state_spec.replay_length,
            window=model.state_spec.window,
            prefix_caching=prefix_caching,
        )
        self._storage = CacheStorage(model.state_spec, limits.sizes, device, poison)
        layers = self._storage.layers
        self._builder = BatchBuilder(self._cache, layers, limits.max_model_len)
        self._runner = Runner(model, layers, limits, device, graphs=graphs, on_progress=on_progress)
        self._scheduler = Scheduler(
            self._cache, limits.max_batch_tokens, limits.max_model_len, eos_token_ids
        )
        self._sampler = Sampler(
            eos_token_ids,
            slot=lambda seq: self._cache.slot(seq.id),
            feed=self._runner.feed,
            draw=model.ops.sample,
            grammars=grammars,
        )
        self._gate = GrammarGate(grammars)
        self._idle = IdleClock(device)
        self._overlap = overlap
        self._flight: _Flight | None = None
        self._steps = 0
        self._step_tokens = self._step_sequences = 0
        self._step_seconds = self._scheduler_seconds = self._seconds_total = 0.0

    @property
    def has_work(self) -> bool:
        """A step would do something."""
        return bool(self._steps_forward or self._gate.num_waiting)

    @property
    def _steps_forward(self) -> bool:
        return self._scheduler.has_work or self._flight is not None

    def add(self, request: GenerateRequest) -> None:
        """Queues a request whose parameters and prompt length were checked."""
        if not self._gate.hold(request):
            self._scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request or one choice of it; frees what it holds before the next step."""
        if not self._gate.abort(request_id, index):
            self._scheduler.abort(request_id, index)

    def abort_all(self) -> list[str]:
        """Ends every request; returns their ids."""
        return self._gate.abort_all() + self._scheduler.abort_all()

    def reset_prefixes(self) -> None:
        """Forgets every cached prefix that no running sequence owns."""
        self._cache.reset_prefixes()

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advances every sequence that can advance; returns what there is to report."""
        for request, gone in self._gate.release(may_wait=not self._steps_forward):
            self._scheduler.add(request)
            for index in gone:
                self._scheduler.abort(request.request_id, index)
        started = time.perf_counter()
        last, self._flight = self._flight, self._launch()
        events = self._land(last)
        if self._flight is not None:
            self._idle.resume()
            choices = self._sampler.launch(self._flight.output, self._flight.plan)
            choices.done = self._idle.stop()
            self._flight.choices = choices
        if not self._overlap:
            last, self._flight = self._flight, None
            events += self._land(last)
        if not self._steps_forward:
            self._idle.rest()
        self._step_seconds = time.perf_counter() - started
        self._seconds_total += self._step_seconds
        return events

    def _launch(self) -> _Flight | None:
        """Plans a step and launches its forward pass; None if nothing can advance."""
        started = time.perf_counter()
        plan = self._scheduler.plan()
        self._scheduler_seconds = time.perf_counter() - started
        if not plan.works:
            return None
        batch = self._builder.build(plan)
        self._idle.resume()
        if plan.copies:
            self._storage.apply(plan.copies)
        flight = _Flight(plan, self._runner.forward(batch))
        self._idle.stop()
        self._steps += 1
        self._step_tokens, self._step_sequences = plan.num_rows, len(plan.works)
        return flight

    def _land(self, flight: _Flight | None) -> list[TokenEvent]:
        """Waits for a step's tokens and takes them in."""
        if flight is None or flight.choices is None:
            return []
        sampled = flight.choices.read()
        self._idle.settle()
        started = time.perf_counter()
        events = self._scheduler.commit(flight.plan, sampled)
        self._scheduler_seconds += time.perf_counter() - started
        return events

    def stats(self) -> EngineStats:
        """Gauges and counters, now."""
        sizes, cache, scheduler = self.limits.sizes, self._cache, self._scheduler
        tails = cache.tails
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + self._gate.num_waiting,
            pages_total=sizes.num_pages,
            pages_used=sizes.num_pages - cache.free_pages,
            pages_kept=cache.kept_pages,
            slots_total=sizes.num_slots,
            slots_used=sizes.num_slots - cache.free_slots,
            tails_total=tails.num_tails,
            tails_stored=tails.num_stored,
            tails_evicted=tails.num_evicted,
            prefix_queries=scheduler.num_queried_tokens,
            prefix_hits=scheduler.num_hit_tokens,
            replayed_tokens=scheduler.num_replayed_tokens,
            preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            generation_tokens=scheduler.num_generated_tokens,
            steps=self._steps,
            step_tokens=self._step_tokens,
            step_sequences=self._step_sequences,
            step_seconds=self._step_seconds,
            scheduler_seconds=self._scheduler_seconds,
            step_seconds_total=self._seconds_total,
            graph_replays=dict(self._runner.graph_replays),
            padding_tokens=self._runner.num_padding_tokens,
            gpu_idle_seconds=self._idle.seconds,
            corrupted_requests=scheduler.num_corrupted,
            page_lifetimes=_times(cache.residence.lifetimes),
            page_idle_times=_times(cache.residence.idle_times),
            page_reuse_gaps=_times(cache.residence.reuse_gaps),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if the cache's books do not add up."""
        self._cache.check_integrity()


def _times(times: residence.Times) -> Times:
    return Times(tuple(times.counts), times.seconds)
