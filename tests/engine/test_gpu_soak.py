"""For minutes on end: random arrivals, aborts, preemptions and shared prefixes, with everything on.

Whatever survives is compared with the same request alone, in an engine without cache, graphs and
overlap. `make soak-gpu`; CONVSERVE_SOAK_SECONDS sets the time for each model (600 by default) and
CONVSERVE_SOAK_SEED the traffic.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import time
from collections import defaultdict
from typing import Any

import pytest
import torch
from convserve.engine.messages import GenerateRequest, SamplingParams
from gpu_traffic import DEVICE, engine, tiny

SECONDS = float(os.environ.get("CONVSERVE_SOAK_SECONDS", "600"))
SEED = int(os.environ.get("CONVSERVE_SOAK_SEED", "0"))

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]


class Traffic:
    """Requests in flight, what each was told, and some that ended whole."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.number = 0
        self.live: dict[str, GenerateRequest] = {}
        self.told: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.ended: dict[str, int] = defaultdict(int)
        self.whole: list[tuple[GenerateRequest, list[list[int]]]] = []
        self.finished = self.aborted = 0

    def arrive(self) -> GenerateRequest:
        rng = self.rng
        stem = [rng.choice([1, 2])] * rng.choice([0, 3, 16, 33, 60])
        prompt = (*stem, *(rng.randrange(64) for _ in range(rng.randint(1, 30))))
        sampled = rng.random() < 0.4
        params = SamplingParams(
            max_tokens=rng.randint(1, 36),
            temperature=1.1 if sampled else 0,
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 5]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
            seed=self.number,
            n=rng.choice([1, 1, 1, 3]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            logprobs=rng.choice([None, None, 2]),
            prompt_logprobs=rng.choice([None, None, None, 1]),
            stop_token_ids=rng.choice([(), (7,)]),
            min_tokens=0,
        )
        request = GenerateRequest(
            request_id=str(self.number),
            prompt=prompt,
            params=params,
            priority=rng.choice([0, 0, 0, 1, -1]),
            cache_salt=rng.choice(["", "", "other"]),
        )
        self.number += 1
        self.live[request.request_id] = request
        return request

    def take(self, events: list[Any]) -> None:
        for event in events:
            assert event.error is None, event.error
            if event.request_id not in self.live:
                continue  # aborted while its last step ran
            self.told[event.request_id, event.index].extend(event.token_ids)
            if event.finish_reason is None:
                continue
            self.ended[event.request_id] += 1
            request = self.live[event.request_id]
            if self.ended[event.request_id] == request.params.n:
                self.forget(event.request_id, keep=self.rng.random() < 0.02)
                self.finished += 1

    def forget(self, request_id: str, keep: bool = False) -> None:
        request = self.live.pop(request_id)
        outputs = [self.told.pop((request_id, i), []) for i in range(request.params.n)]
        self.ended.pop(request_id, None)
        if keep:
            self.whole.append((request, outputs))


def alone(model: Any, request: GenerateRequest) -> list[list[int]]:
    core = engine(model, 128, pages=400, graphs=False, overlap=False, prefix_caching=False)
    core.add(request)
    outputs: list[list[int]] = [[] for _ in range(request.params.n)]
    while core.has_work:
        for event in core.step():
            outputs[event.index] += event.token_ids
    return outputs


@pytest.mark.parametrize(
    ("variant", "dtype", "backend"),
    [
        ("lowrank all", torch.float32, "deterministic"),
        ("headwise all", torch.bfloat16, "deterministic"),
        ("lowrank qkv", torch.bfloat16, "auto"),
        ("delta lowrank", torch.bfloat16, "auto"),
    ],
)
def test_nothing_is_lost_and_nothing_is_wrong(
    variant: str, dtype: torch.dtype, backend: str
) -> None:
    model = tiny(variant, dtype, backend)
    core = engine(model, budget=48, slots=8, pages=44)
    traffic = Traffic(SEED)
    rng = random.Random(SEED + 1)
    stop_at = time.monotonic() + SECONDS
    steps = compared = 0
    memory = 0
    while time.monotonic() < stop_at:
        if len(traffic.live) < 30 and rng.random() < 0.35:
            core.add(traffic.arrive())
        if rng.random() < 0.02 and traffic.live:
            request_id = rng.choice(list(traffic.live))
            core.abort(request_id)
            traffic.forget(request_id)
            traffic.aborted += 1
        if rng.random() < 0.0005:
            core.reset_prefixes()
        traffic.take(core.step())
        steps += 1
        if steps % 100 == 0:
            core.check_integrity()
        if steps % 2000 == 0 and DEVICE.type == "cuda":
            gc.collect()  # engines that were compared with
            used = torch.cuda.memory_allocated()
            memory = memory or used
            assert used <= memory + 2**20, f"{used - memory} bytes more than at step 2000"
        if backend == "deterministic":
            while traffic.whole:
                request, outputs = traffic.whole.pop()
                assert alone(model, request) == outputs, request
                compared += 1
        traffic.whole.clear()
    while core.has_work:
        traffic.take(core.step())
    core.check_integrity()
    stats = core.stats()
    assert not traffic.live
    assert stats.pages_used == stats.slots_used == stats.running == stats.waiting == 0
    assert stats.preemptions > 0
    logging.getLogger(__name__).warning(
        "%s, %s, %s: %d steps, %d requests finished, %d aborted, %d preemptions, %d of %d prompt "
        "tokens hit, %d requests compared",
        *(variant, dtype, backend, steps, traffic.finished, traffic.aborted, stats.preemptions),
        *(stats.prefix_hits, stats.prefix_queries, compared),
    )
