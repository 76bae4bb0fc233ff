"""On a GPU: graphs repeat eager steps bit for bit, overlap changes no token, deterministic mode
gives the same bits wherever prompts are cut, and long random traffic leaves the right state."""

from __future__ import annotations

import functools
import random
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from convserve.cache import CacheSizes
from convserve.engine import graphs as graphs_module
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import Decoder, load_model
from convserve.engine.resolve import Limits
from golden import GOLDEN
from safetensors.torch import load_file
from tiny_models import config_of, write_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convserve.engine.models import ForwardBatch
    from convserve.engine.output import Output

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VARIANTS = ("plain", "lowrank qkv", "lowrank all", "headwise all", "static all", "norm first")
CHECKPOINTS = (
    "hf_llama",
    "hf_qwen3",
    "static_qkv",
    "dynconv_lowrank_qkv",
    "dynconv_headwise_qkv",
    "dynconv_all_linear",
)
HYBRIDS = ("hf_lfm2", "hf_mamba2", "hf_qwen3_next", "jet_nemotron_tiny")


@functools.cache
def tiny(variant: str, dtype: torch.dtype, backend: Any = "auto") -> Decoder:
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "m", config_of(variant))
        return load_model(Path(folder) / "m", dtype, CUDA, backend)


def engine(model: Decoder, budget: int = 64, slots: int = 6, pages: int = 40, **options: Any):
    sizes = CacheSizes(pages, 4, slots, model.state_spec.ring_len(), 8)
    limits = Limits(sizes, min(128, sizes.capacity), budget, 0)
    return EngineCore(model, limits, (), CUDA, poison=True, **options)


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replayed_graph_gives_the_bits_of_the_eager_step(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of random traffic, padding included: logits, choices, pages and rings."""
    core = engine(tiny(variant, dtype))
    runner = core._runner
    state = [
        t
        for layer in core._storage.layers
        for t in (layer.k_pages, layer.v_pages, *layer.rings.values())
        if t is not None
    ] + [runner._last]
    used: set[object] = set()
    replay = graphs_module.StepGraph.replay

    def checked(self: graphs_module.StepGraph, batch: ForwardBatch) -> Output:
        before = [t.clone() for t in state]
        self._staging.upload_padded(batch, self._shape, self._block)
        logits, best = runner._step(self._shape.batch(self._block, core._storage.layers))
        after = [t[1:].clone() for t in state]
        for t, old in zip(state, before, strict=True):
            t.copy_(old)
        output = replay(self, batch)
        rows = len(output.best)
        assert torch.equal(output.best, best[:rows])
        assert torch.equal(output.logits, logits[:rows])
        for t, eager in zip(state, after, strict=True):
            assert torch.equal(t[1:].nan_to_num(-7.0), eager.nan_to_num(-7.0))
        used.add(self._shape)
        return output

    monkeypatch.setattr(graphs_module.StepGraph, "replay", checked)
    run(core, list(traffic(1, 40)))
    assert len(used) > 8


@pytest.mark.parametrize("variant", ["lowrank qkv", "lowrank all"])
def test_overlap_and_graphs_change_no_token(variant: str) -> None:
    model = tiny(variant, torch.float32, "deterministic")
    requests = list(traffic(2, 60))
    outputs = [
        run(engine(model, budget, pages=pages, overlap=overlap, graphs=graphs), requests)
        for overlap, graphs, budget, pages in (
            (False, False, 64, 200),
            (True, False, 64, 40),
            (True, True, 64, 40),
            (True, True, 7, 33),
        )
    ]
    for other in outputs[1:]:
        assert other == outputs[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic_bits_do_not_depend_on_where_a_prompt_is_cut(variant: str) -> None:
    model = tiny(variant, torch.bfloat16, "deterministic")
    prompt = tuple(random.Random(3).randrange(64) for _ in range(70))
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=3, prompt_logprobs=1)
    seen: list[object] = []
    for budget, crowd in ((256, 0), (1, 0), (3, 2), (17, 5), (64, 3)):
        core = engine(model, budget, pages=400)
        core.add(GenerateRequest(request_id="r", prompt=prompt, params=params))
        for i in range(crowd):
            core.add(
                GenerateRequest(request_id=str(i), prompt=prompt[i : 2 * i + 3], params=params)
            )
        told: list[object] = []
        while core.has_work:
            told += [
                (e.token_ids, e.logprobs, e.prompt_logprobs)
                for e in core.step()
                if e.request_id == "r"
            ]
        seen.append(told)
    for other in seen[1:]:
        assert other == seen[0]


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "auto") for name in (*CHECKPOINTS, *HYBRIDS)),
        *((name, "deterministic") for name in CHECKPOINTS),
    ],
)
def test_golden_greedy_tokens(name: str, backend: Any) -> None:
    model = load_model(GOLDEN / "models" / name, torch.float32, CUDA, backend)
    expected = load_file(GOLDEN / "models" / name / "expected.safetensors")
    prompts = [expected[f"p{i}.input_ids"].tolist() for i in range(3)]
    for budget, graphs, overlap in ((1, True, True), (3, False, True), (64, True, False)):
        sizes = CacheSizes(64, 16, 4, model.state_spec.ring_len(), 4)
        core = EngineCore(
            model,
            Limits(sizes, 256, budget, 0),
            (),
            CUDA,
            graphs=graphs,
            overlap=overlap,
            poison=True,
        )
        params = SamplingParams(temperature=0, max_tokens=16)
        requests = [
            (0, GenerateRequest(request_id=str(i), prompt=tuple(p), params=params))
            for i, p in enumerate(prompts)
        ]
        tokens = run(core, requests)
        for i in range(3):
            assert tokens[str(i), 0] == expected[f"p{i}.greedy"].tolist()


def test_rings_after_long_random_traffic_are_what_a_fresh_engine_computes() -> None:
    model = tiny("lowrank all", torch.float32, "deterministic")
    core = engine(model, budget=32, pages=60)
    rng = random.Random(5)
    number = 0
    for step in range(3000):
        if rng.random() < 0.2:
            prompt = tuple(rng.choice([1, 2]) for _ in range(rng.randint(1, 60)))
            params = SamplingParams(
                max_tokens=rng.randint(1, 40), temperature=0, n=rng.choice([1, 2])
            )
            core.add(GenerateRequest(request_id=str(number), prompt=prompt, params=params))
            number += 1
        if rng.random() < 0.05 and number:
            core.abort(str(rng.randrange(number)))
        core.step()
        if step % 50 == 0:
            core.check_integrity()
    scheduler = core._scheduler
    checked = 0
    for seq in scheduler._running:
        count = min(seq.num_computed, len(seq.tokens))
        if not count:
            continue
        fresh = engine(model, budget=128, pages=60, graphs=False, prefix_caching=False)
        params = SamplingParams(max_tokens=4, temperature=0)
        fresh.add(GenerateRequest(request_id="r", prompt=tuple(seq.tokens[:count]), params=params))
        fresh.step()
        (twin,) = fresh._scheduler._running
        slots = core._cache.slot(seq.id), fresh._cache.slot(twin.id)
        length = core.limits.sizes.ring_len
        for mine, theirs in zip(core._storage.layers, fresh._storage.layers, strict=True):
            for name, ring in mine.rings.items():
                rows = [p % length for p in range(max(0, count - 3), count)]
                assert torch.equal(ring[slots[0], rows], theirs.rings[name][slots[1], rows])
        checked += 1
    assert checked > 2
    core.abort_all()
    while core.has_work:
        core.step()
    stats = core.stats()
    assert stats.pages_used == stats.slots_used == 0
    core.check_integrity()
