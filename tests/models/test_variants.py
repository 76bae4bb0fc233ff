"""Every option of the `conv` object means what the format says: each is compared with a decoder
written from the definitions alone, whole and in chunks, and after a replay of its stated length."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from convserve.cache.pools import SequenceId
from convserve.engine.models import Decoder, load_model, replay
from model_bench import TOKENS, Bench, sequence
from tiny_models import VARIANTS, config_of, naive_logits, write_model

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")
REPLAYED = [v for v in VARIANTS if not v.startswith(("delta", "mamba2"))]


@functools.cache
def prepared(variant: str) -> tuple[Decoder, Tensor]:
    """The loaded model in float64, and what its logits should be."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(variant)
        weights = write_model(Path(folder) / "m", config)
        model = load_model(Path(folder) / "m", torch.float64, CPU, backend="reference")
    return model, naive_logits(config, weights, TOKENS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_means_what_the_format_says(variant: str) -> None:
    model, expected = prepared(variant)
    for chunk in (len(TOKENS), 3):
        bench = Bench(model)
        assert bench.cache.admit(SequenceId(1), TOKENS)
        got = bench.run(sequence(1), chunk)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", REPLAYED)
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


@pytest.mark.parametrize(
    "variant",
    ["lowrank all", "norm first, full", "headwise", "static all", "delta lowrank", "mamba2"],
)
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
