"""One sequence at a time through a model, its cache and the engine's batch builder, by hand."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from convserve.cache import CacheManager, CacheSizes, CacheStorage, Copies
from convserve.cache.pools import SequenceId
from convserve.engine.batch_builder import BatchBuilder
from convserve.engine.messages import SamplingParams
from convserve.engine.plan import StepPlan, Work
from convserve.engine.sequence import Sequence

if TYPE_CHECKING:
    from convserve.engine.models import Decoder
    from torch import Tensor

CPU = torch.device("cpu")
TOKENS = [random.Random(5).randrange(64) for _ in range(90)]


def sequence(number: int, start: int = 0) -> Sequence:
    return Sequence(
        id=SequenceId(number),
        request_id=str(number),
        index=0,
        params=SamplingParams(),
        tokens=TOKENS,
        prompt_len=len(TOKENS),
        max_len=256,
        seed=0,
        priority=0,
        salt="",
        arrival=number,
        arrived_at=0.0,
        num_computed=start,
    )


class Bench:
    """One model over one cache; every slot, page and tail full of NaN at first."""

    def __init__(self, model: Decoder, num_tails: int = 4) -> None:
        self.model = model
        spec = model.state_spec
        sizes = CacheSizes(64, 2, 3, spec.ring_len(), num_tails)
        self.cache = CacheManager(sizes, replay_length=spec.replay_length, window=spec.window)
        self.storage = CacheStorage(spec, sizes, CPU, poison=True)
        self.builder = BatchBuilder(self.cache, self.storage.layers, 256)

    def run(self, seq: Sequence, chunk: int, last: int | None = None) -> Tensor:
        """The rest of a sequence in chunks; logits of its rows, or of its `last` ones alone."""
        parts: list[Tensor] = []
        while seq.num_pending:
            start, rows = seq.num_computed, min(chunk, seq.num_pending)
            first = 0 if last is None else len(seq.tokens) - last
            skip = min(rows, max(0, first - start))
            work = Work(seq, start, rows, False, score_from=skip, score_rows=rows - skip)
            self.storage.apply(self.cache.take_copies())
            parts.append(
                self.model.forward(self.builder.build(StepPlan((work,), Copies(), work.rows)))
            )
            seq.num_computed += rows
            self.cache.commit(seq.id, seq.tokens, seq.num_computed)
        return torch.cat(parts)
