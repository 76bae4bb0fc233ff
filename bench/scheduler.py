"""What planning and committing a step costs the host, without any model: every sequence generates.

    python bench/scheduler.py [SEQUENCES ...]

Needs no installation and no device. Times are of one core; pages of sixteen tokens fill up at the
same step for all sequences, which is in the mean and not in the median.
"""

from __future__ import annotations

import random
import statistics
import sys
import time

import _import  # noqa: F401  (makes `convserve` importable)
from convserve.cache import CacheManager, CacheSizes
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.plan import Sampled
from convserve.engine.scheduler import Scheduler

CONTEXT, STEPS = 1024, 200


def measure(count: int) -> list[float]:
    """Microseconds of each of some steps in which `count` sequences advance by one token."""
    sizes = CacheSizes(count * 130, 16, count, 16, 64)
    scheduler = Scheduler(CacheManager(sizes, replay_length=72), 2048, CONTEXT + 900, ())
    params = SamplingParams(max_tokens=STEPS + 600, temperature=0)
    for i in range(count):
        prompt = tuple(random.randrange(1000) for _ in range(CONTEXT))
        scheduler.add(GenerateRequest(request_id=str(i), prompt=prompt, params=params))
    times: list[float] = []
    last = scheduler.plan()
    while len(times) < STEPS:
        started = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        sampled = [Sampled(5) if work.samples else Sampled() for work in last.works]
        begun = time.perf_counter()
        scheduler.commit(last, sampled)
        took = planned - started + time.perf_counter() - begun
        if last.num_rows == len(last.works) == count:
            times.append(took * 1e6)
        last = plan
    return times


for size in [int(a) for a in sys.argv[1:]] or [1, 8, 64, 256]:
    took = measure(size)
    print(
        f"{size:4} sequences: median {statistics.median(took):.0f} us a step, "
        f"mean {statistics.mean(took):.0f}",
        flush=True,
    )
