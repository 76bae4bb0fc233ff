"""Checkpoints give exactly the numbers of the code they were made with, however a prompt is cut
and whoever shares the batch, through the engine's own builder, cache and forward."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from convserve.cache import CacheManager, CacheSizes, CacheStorage, Copies, LayerState
from convserve.cache.pools import SequenceId
from convserve.engine.batch_builder import BatchBuilder
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import Decoder, load_model
from convserve.engine.plan import StepPlan, Work
from convserve.engine.resolve import Limits
from convserve.engine.sequence import Sequence
from flat_batches import read_ring
from golden import GOLDEN, cases, tolerance
from safetensors.torch import load_file

if TYPE_CHECKING:
    from torch import Tensor

CPU = torch.device("cpu")
KINDS = (
    "model.llama",
    "model.qwen3",
    "model.olmoe",
    "model.dynconv",
    "model.lfm2",
    "model.mamba2",
    "model.qwen3_next",
    "model.jet_nemotron",
)
CASES = [case for kind in KINDS for case in cases(kind)]


@functools.cache
def loaded(name: str) -> tuple[Decoder, dict[str, Tensor]]:
    folder = GOLDEN / "models" / name
    return load_model(folder, torch.float32, CPU), load_file(folder / "expected.safetensors")


class Harness:
    """Sequences of one model, advanced by hand; every row's logits kept."""

    def __init__(self, model: Decoder, sequences: list[list[int]]) -> None:
        sizes = CacheSizes(96, 4, len(sequences) + 1, model.state_spec.ring_len())
        self.cache = CacheManager(sizes)
        storage = CacheStorage(model.state_spec, sizes, CPU, poison=True)
        self.state: tuple[LayerState, ...] = storage.layers
        self._builder = BatchBuilder(self.cache, self.state, 128)
        self._model = model
        # So that slots and pages do not start at the same ids.
        self.cache.admit(SequenceId(99), [0] * 5)
        self.seqs = [self._sequence(i, tokens) for i, tokens in enumerate(sequences)]
        self.logits: list[list[Tensor]] = [[] for _ in sequences]

    def _sequence(self, number: int, tokens: list[int]) -> Sequence:
        seq = Sequence(
            id=SequenceId(number),
            request_id=str(number),
            index=0,
            params=SamplingParams(),
            tokens=tokens,
            prompt_len=len(tokens),
            max_len=len(tokens) + 1,
            seed=0,
            priority=0,
            salt="",
            arrival=number,
            arrived_at=0.0,
        )
        assert self.cache.admit(seq.id, tokens)
        return seq

    def step(self, rows: list[int]) -> None:
        """Advances sequence i by rows[i] tokens (or what is left of it)."""
        works: list[Work] = []
        for seq, count in zip(self.seqs, rows, strict=True):
            count = min(count, seq.num_pending)
            if count:
                start = seq.num_computed
                works.append(Work(seq, start, count, samples=False, score_rows=count))
                seq.num_computed += count
        if not works:
            return
        batch = self._builder.build(StepPlan(tuple(works), Copies(), sum(w.rows for w in works)))
        parts = self._model.forward(batch).split([w.rows for w in works])
        for work, part in zip(works, parts, strict=True):
            self.logits[int(work.seq.id)].append(part)

    def run(self, chunk: int) -> None:
        """Advances every sequence by chunks until all are done."""
        while any(seq.num_pending for seq in self.seqs):
            self.step([chunk] * len(self.seqs))


def sequences_of(expected: dict[str, Tensor]) -> list[list[int]]:
    return [
        expected[f"p{i}.input_ids"].tolist() + expected[f"p{i}.greedy"].tolist()[:15]
        for i in range(sum(name.endswith(".greedy") for name in expected))
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 7, 1000])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_logits_however_the_prompt_is_cut(case: dict[str, Any], chunk: int) -> None:
    model, expected = loaded(case["folder"].split("/")[-1])
    harness = Harness(model, sequences_of(expected))
    harness.run(chunk)
    for i, parts in enumerate(harness.logits):
        got = torch.cat(parts)
        want = expected[f"p{i}.logits"]
        torch.testing.assert_close(got, want, **tolerance(case))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_logits_with_neighbours_at_other_places(case: dict[str, Any]) -> None:
    """One sequence prefills a chunk while others decode or verify, in one flat batch."""
    model, expected = loaded(case["folder"].split("/")[-1])
    harness = Harness(model, sequences_of(expected))
    pattern = [(7, 1, 3), (1, 5, 1), (2, 1, 6), (1, 1, 1)]
    turn = 0
    while any(seq.num_pending for seq in harness.seqs):
        rows = pattern[turn % len(pattern)]
        harness.step([rows[i % 3] for i in range(len(harness.seqs))])
        turn += 1
    for i, parts in enumerate(harness.logits):
        torch.testing.assert_close(torch.cat(parts), expected[f"p{i}.logits"], **tolerance(case))


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7, 1000])
@pytest.mark.parametrize("case", cases("model.dynconv"), ids=lambda c: c["id"])
def test_conv_state_after_the_prompt(case: dict[str, Any], chunk: int) -> None:
    model, expected = loaded(case["folder"].split("/")[-1])
    conv = model.config.conv
    assert conv is not None
    prompts = [expected[f"p{i}.input_ids"].tolist() for i in (0, 1)]
    harness = Harness(model, prompts)
    harness.run(chunk)
    checked = 0
    for i, prompt in enumerate(prompts):
        slot = harness.cache.slot(SequenceId(i))
        for layer in range(model.config.num_layers):
            windows = ring_windows(harness, model, layer, slot, len(prompt))
            for place, window in windows.items():
                want = expected[f"p{i}.conv_state.{layer}.{place}"]
                torch.testing.assert_close(window.T, want, **tolerance(case))
                checked += 1
    assert checked == 2 * len(conv.placement) * model.config.num_layers


def ring_windows(
    harness: Harness, model: Decoder, layer: int, slot: int, end: int
) -> dict[str, Tensor]:
    """Each convolved place's last W - 1 inputs, oldest first."""
    c = model.config
    assert c.conv is not None
    widths = {"q": c.q_width, "k": c.kv_width, "v": c.kv_width}
    widths |= {"gate": c.intermediate_size, "up": c.intermediate_size}
    windows: dict[str, Tensor] = {}
    for site, ring in harness.state[layer].rings.items():
        window = read_ring(ring, slot, end, c.conv.width - 1)
        start = 0
        for place in {"qkv": "qkv", "gate_up": ("gate", "up")}.get(site, (site,)):
            if place in c.conv.placement:
                stop = start + widths.get(place, c.hidden_size)
                windows[place] = window[:, start:stop]
                start = stop
    return windows


@pytest.mark.parametrize("budget", [1, 2, 3, 4, 7, 64])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_greedy_tokens_through_the_engine(case: dict[str, Any], budget: int) -> None:
    model, expected = loaded(case["folder"].split("/")[-1])
    sizes = CacheSizes(64, 4, 4, model.state_spec.ring_len())
    core = EngineCore(model, Limits(sizes, 256, budget, 0), (), CPU, poison=True)
    params = SamplingParams(temperature=0, max_tokens=16)
    output: dict[str, list[int]] = {}
    for i in range(3):
        prompt = tuple(expected[f"p{i}.input_ids"].tolist())
        core.add(GenerateRequest(request_id=str(i), prompt=prompt, params=params))
        output[str(i)] = []
    while core.has_work:
        for event in core.step():
            output[event.request_id] += event.token_ids
    for i in range(3):
        assert output[str(i)] == expected[f"p{i}.greedy"].tolist()
    core.check_integrity()
    assert core.stats().pages_used == core.stats().slots_used == 0
