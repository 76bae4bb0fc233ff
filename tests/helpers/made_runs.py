"""Runs of the load test that nobody made: records of a known shape, and results of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from convserve.loadtest.prompts import PromptPlan
from convserve.loadtest.records import AuditSample, RequestRecord, pack_counts, pack_offsets
from convserve.loadtest.result import Result, summarise
from convserve.loadtest.scenario import make_scenario

QUIET = AuditSample(loop_lag=[0.0001] * 100, cpu_seconds=1.0, wall_seconds=60.0)


def records(
    count: int = 600, scale: float = 1.0, seed: int = 0, fail: float = 0.0
) -> list[RequestRecord]:
    """Requests 0.1 s apart; TTFT lognormal around 50 ms, 8 tokens 10 ms apart."""
    generator = np.random.default_rng(seed)
    made: list[RequestRecord] = []
    for k in range(count):
        start = 0.1 * k
        first = scale * 0.05 * float(np.exp(0.3 * generator.normal()))
        gaps = scale * generator.uniform(0.008, 0.012, size=7)
        offsets = [first, *(first + np.cumsum(gaps)).tolist()]
        failed = generator.random() < fail
        made.append(
            RequestRecord(
                index=k,
                intended=start,
                dispatched=start + 1e-5,
                sent=start + 1e-4,
                first_byte=start + first,
                first_token=start + first,
                last_token=start + offsets[-1],
                end=start + offsets[-1] + 1e-4,
                outcome="truncated" if failed else "ok",
                message="closed" if failed else None,
                status=200,
                prompt_tokens=10,
                cached_tokens=5,
                output_tokens=8,
                max_tokens=8,
                basis="ids",
                chunk_us=pack_offsets(offsets),
                chunk_tokens=pack_counts([1] * 8),
            )
        )
    return made


def result(made: list[RequestRecord], *, sample: AuditSample = QUIET, **scenario: Any) -> Result:
    """A run of them."""
    table = {"name": "t", "load": {"strategy": "poisson", "rate": 10, "max_requests": 600}}
    return summarise(
        scenario=make_scenario({**table, **scenario}),
        records=made,
        samples=[sample],
        prompts=PromptPlan(kind="ids", vocab=9),
        target="http://x",
        model="m",
        started="2026-01-01T00:00:00+00:00",
        command=["convserve", "loadtest", "http://x", "--set", "a b"],
    )
