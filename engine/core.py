"""The engine's step: plan, build, run, sample, commit. Read this file first.

An EngineCore is driven by whoever owns it (a process loop, a thread, the offline `LLM`): requests
are added between steps and every step returns the events it produced.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from ..cache import CacheManager, CacheStorage
from .batch_builder import BatchBuilder
from .messages import EngineStats
from .runner import Model, Runner
from .sampler import Sampler
from .scheduler import Scheduler

if TYPE_CHECKING:
    from collections.abc import Callable

    from .messages import GenerateRequest, TokenEvent
    from .resolve import Limits


class EngineCore:
    """A model, its cache and its scheduler."""

    def __init__(
        self,
        model: Model,
        limits: Limits,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        prefix_caching: bool = True,
        graphs: bool = True,
        poison: bool = False,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Allocates the cache and prepares the model's steps.

        Args:
            graphs: replay captured graphs where the device has them.
            poison: fill the cache with NaN (tests).
            on_progress: called with (graphs captured, graphs in all).
        """
        self.limits = limits
        self._cache = CacheManager(
            limits.sizes,
            replay_length=model.state_spec.replay_length,
            prefix_caching=prefix_caching,
        )
        self._storage = CacheStorage(model.state_spec, limits.sizes, device, poison)
        layers = self._storage.layers
        self._builder = BatchBuilder(self._cache, layers, limits.max_model_len)
        self._runner = Runner(model, layers, limits, device, graphs=graphs, on_progress=on_progress)
        self._scheduler = Scheduler(
            self._cache, limits.max_batch_tokens, limits.max_model_len, eos_token_ids
        )
        self._sampler = Sampler(eos_token_ids)
        self._steps = 0
        self._step_tokens = 0
        self._step_seconds = self._scheduler_seconds = self._seconds_total = 0.0

    @property
    def has_work(self) -> bool:
        """A step would do something."""
        return self._scheduler.has_work

    def add(self, request: GenerateRequest) -> None:
        """Queues a request whose parameters and prompt length were checked."""
        self._scheduler.add(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Ends a request or one choice of it; frees what it holds before the next step."""
        self._scheduler.abort(request_id, index)

    def abort_all(self) -> list[str]:
        """Ends every request; returns their ids."""
        return self._scheduler.abort_all()

    def reset_prefixes(self) -> None:
        """Forgets every cached prefix that no running sequence owns."""
        self._cache.reset_prefixes()

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Advances every sequence that can advance; returns what there is to report."""
        started = time.perf_counter()
        plan = self._scheduler.plan()
        if not plan.works:
            return []
        planned = time.perf_counter()
        if plan.copies:
            self._storage.apply(plan.copies)
        batch = self._builder.build(plan)
        logits = self._runner.forward(batch)
        sampled = self._sampler.sample(logits, plan)
        ran = time.perf_counter()
        events = self._scheduler.commit(plan, sampled)
        ended = time.perf_counter()
        self._steps += 1
        self._step_tokens = plan.num_rows
        self._step_seconds = ended - started
        self._scheduler_seconds = (planned - started) + (ended - ran)
        self._seconds_total += ended - started
        return events

    def stats(self) -> EngineStats:
        """Gauges and counters, now."""
        sizes, cache, scheduler = self.limits.sizes, self._cache, self._scheduler
        tails = cache.tails
        return EngineStats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
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
            step_seconds=self._step_seconds,
            scheduler_seconds=self._scheduler_seconds,
            step_seconds_total=self._seconds_total,
        )

    def check_integrity(self) -> None:
        """Raises AssertionError if the cache's books do not add up."""
        self._cache.check_integrity()
