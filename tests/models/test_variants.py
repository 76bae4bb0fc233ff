"""Every option of the `conv` object means what the format says: each is compared with a decoder
written from the definitions alone, whole and in chunks, and after a replay of its stated length."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from convserve.cache import CacheManager, CacheSizes, CacheStorage, Copies
from convserve.cache.pools import SequenceId
from convserve.engine.batch_builder import BatchBuilder
from convserve.engine.messages import SamplingParams
from convserve.engine.models import Decoder, load_model, replay
from convserve.engine.plan import StepPlan, Work
from convserve.engine.sequence import Sequence
from tiny_models import VARIANTS, config_of, naive_logits, write_model

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")
TOKENS = [random.Random(5).randrange(64) for _ in range(90)]


@functools.cache
def prepared(variant: str) -> tuple[Decoder, Tensor]:
    """The loaded model in float64, and what its logits should be."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(variant)
        weights = write_model(Path(folder) / "m", config)
        model = load_model(Path(folder) / "m", torch.float64, CPU, backend="reference")
    return model, naive_logits(config, weights, TOKENS)


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
        self.cache = CacheManager(sizes, replay_length=spec.replay_length)
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
            parts.append(self.model.forward(self.builder.build(StepPlan((work,), Copies()))))
            seq.num_computed += rows
            self.cache.commit(seq.id, seq.tokens, seq.num_computed)
        return torch.cat(parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_means_what_the_format_says(variant: str) -> None:
    model, expected = prepared(variant)
    for chunk in (len(TOKENS), 3):
        bench = Bench(model)
        assert bench.cache.admit(SequenceId(1), TOKENS)
        got = bench.run(sequence(1), chunk)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_replay_of_the_stated_length_is_exact_and_of_less_is_not(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of a prefix are cached, windows are NaN: after N tokens nothing remains."""
    model, expected = prepared(variant)
    length = model.state_spec.replay_length
    assert length is not None
    bench = Bench(model, num_tails=0)
    assert bench.cache.admit(SequenceId(1), TOKENS)
    bench.run(sequence(1), 64)
    admission = bench.cache.admit(SequenceId(2), TOKENS)
    assert admission is not None
    assert admission.shared == len(TOKENS) - 2
    assert admission.start == max(admission.shared - length, 0)
    assert admission.start > 0
    got = bench.run(sequence(2, admission.start), 7)
    torch.testing.assert_close(got[-2:], expected[-2:], atol=1e-4, rtol=1e-4)
    bench.cache.release(SequenceId(2))
    assert bench.cache.admit(SequenceId(4), TOKENS) == admission
    with monkeypatch.context() as patch:  # leave out every row that a layer does not need
        patch.setattr(replay, "WORTH_DROPPING", 1)
        for chunk in (90, 5):
            again = sequence(4, admission.start)
            got = bench.run(again, chunk, last=2)
            torch.testing.assert_close(got, expected[-2:], atol=1e-4, rtol=1e-4)
    bench.cache.release(SequenceId(4))
    if length:
        bench.cache.admit(SequenceId(3), TOKENS)
        for layer in bench.storage.layers:
            for ring in layer.rings.values():
                ring.fill_(torch.nan)
        short = bench.run(sequence(3, admission.start + 1), 7)
        assert not torch.isfinite(short[-2:]).all()


@pytest.mark.parametrize("variant", ["lowrank all", "norm first, full", "headwise", "static all"])
def test_stored_tails_are_exact(variant: str) -> None:
    model, expected = prepared(variant)
    bench = Bench(model)
    first = sequence(1)
    first.tokens = TOKENS[:88]
    assert bench.cache.admit(SequenceId(1), first.tokens)
    bench.run(first, 16)
    admission = bench.cache.admit(SequenceId(2), TOKENS)
    assert admission is not None
    assert admission.start == admission.shared == 88
    got = bench.run(sequence(2, 88), 1)
    torch.testing.assert_close(got, expected[88:], atol=1e-4, rtol=1e-4)
