"""Random traffic for tiny models on the device at hand: a GPU, or the CPU where there is none."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from convserve.cache import CacheSizes
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import Decoder, load_model
from convserve.engine.resolve import Limits
from tiny_models import config_of, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def tiny(variant: str, dtype: torch.dtype, backend: Any = "auto") -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "m", config_of(variant))
        return load_model(Path(folder) / "m", dtype, DEVICE, backend)


def engine(model: Decoder, budget: int = 64, slots: int = 6, pages: int = 40, **options: Any):
    sizes = CacheSizes(pages, 4, slots, model.state_spec.ring_len(), 8)
    limits = Limits(sizes, min(128, sizes.capacity), budget, 0)
    return EngineCore(model, limits, (), DEVICE, poison=True, **options)


def traffic(seed: int, count: int) -> Iterator[tuple[int, GenerateRequest]]:
    """(step, request), prompts often alike."""
    rng = random.Random(seed)
    for i in range(count):
        length = rng.choice([1, 2, 3, 5, 17, 30, 44, 60])
        prompt = tuple(rng.choice([1, 1, 1, 2]) if rng.random() < 0.5 else 3 for _ in range(length))
        params = SamplingParams(
            max_tokens=rng.randint(1, 20),
            temperature=rng.choice([0, 0, 1.2]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 5]),
            seed=i,
            n=rng.choice([1, 1, 2]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
            logprobs=rng.choice([None, 2]),
        )
        yield (
            rng.randint(0, 3 * count),
            GenerateRequest(request_id=str(i), prompt=prompt, params=params),
        )


def run(
    core: EngineCore, requests: list[tuple[int, GenerateRequest]]
) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    step = 0
    pending = sorted(requests, key=lambda r: r[0])
    while core.has_work or pending:
        while pending and pending[0][0] <= step:
            core.add(pending.pop(0)[1])
        for event in core.step():
            assert event.error is None, event.error
            tokens.setdefault((event.request_id, event.index), []).extend(event.token_ids)
        core.check_integrity()
        step += 1
    stats = core.stats()
    assert stats.pages_used == stats.slots_used == 0
    return tokens
