"""On a GPU: graphs repeat eager steps bit for bit, overlap changes no token, deterministic mode
gives the same bits wherever prompts are cut, and long random traffic leaves the right state."""

from __future__ import annotations

import random
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from convserve.cache import CacheSizes
from convserve.engine import graphs as graphs_module
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import load_model
from convserve.engine.resolve import Limits
from golden import GOLDEN
from gpu_traffic import engine, run, tiny, traffic
from safetensors.torch import load_file
from tiny_models import config_of, write_model

if TYPE_CHECKING:
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
RECURRENT = ("delta", "delta lowrank", "delta headwise", "mamba2 headwise")


@pytest.mark.parametrize("variant", [*VARIANTS, *RECURRENT])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_replayed_graph_gives_the_bits_of_the_eager_step(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step of random traffic, padding included: logits, choices, pages, rings, states."""
    core = engine(tiny(variant, dtype))
    runner = core._runner
    state = [
        t
        for layer in core._storage.layers
        for t in (layer.k_pages, layer.v_pages, layer.recurrent, *layer.rings.values())
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


def test_idle_time_is_counted_while_there_is_work_and_only_then() -> None:
    core = engine(tiny("lowrank qkv", torch.float32))

    def idle_of(count: int, pause: float) -> float:
        before = core.stats().gpu_idle_seconds
        core.add(
            GenerateRequest(
                request_id="r",
                prompt=(1, 2, 3),
                params=SamplingParams(max_tokens=count, temperature=0, ignore_eos=True),
            )
        )
        while core.has_work:
            core.step()
            time.sleep(pause)
        return core.stats().gpu_idle_seconds - before

    idle_of(30, 0)
    time.sleep(0.5)
    assert idle_of(30, 0) < 0.4, "the pause without work was counted"
    assert idle_of(11, 0.05) > 0.3, "the host was late and nobody saw it"


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
        if not count or count < core._cache.shared(seq.id):
            continue  # the windows inside a replay are not exact
        fresh = engine(model, budget=128, pages=60, graphs=False, prefix_caching=False)
        params = SamplingParams(max_tokens=4, temperature=0)
        fresh.add(GenerateRequest(request_id="r", prompt=tuple(seq.tokens[:count]), params=params))
        fresh.step()
        (twin,) = fresh._scheduler._running
        slots = core._cache.slot(seq.id), fresh._cache.slot(twin.id)
        length = core.limits.sizes.ring_len
        for i, (mine, theirs) in enumerate(
            zip(core._storage.layers, fresh._storage.layers, strict=True)
        ):
            for name, ring in mine.rings.items():
                rows = [p % length for p in range(max(0, count - 3), count)]
                difference = (ring[slots[0], rows] - theirs.rings[name][slots[1], rows]).abs().max()
                assert not difference, (difference, name, i, count, seq)
        checked += 1
    assert checked > 2
    core.abort_all()
    while core.has_work:
        core.step()
    stats = core.stats()
    assert stats.pages_used == stats.slots_used == 0
    core.check_integrity()


def test_every_kernel_of_a_start_is_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one they take a minute and more on an empty cache."""
    from convserve.kernels import triton_compile

    triton_jit = pytest.importorskip("triton.runtime.jit")
    late: list[str] = []
    compile_now = triton_jit.JITFunction._do_compile

    def counted(self: Any, *args: Any) -> Any:
        late.append(self.fn.__name__)
        return compile_now(self, *args)

    monkeypatch.setattr(triton_jit.JITFunction, "_do_compile", counted)
    monkeypatch.setattr(triton_compile, "EXPECTED", ("self", "args"))
    config = {**config_of("lowrank all"), "hidden_size": 80}  # nobody else's constants
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "m", config)
        model = load_model(Path(folder) / "m", torch.bfloat16, CUDA)
    core = engine(model)
    params = SamplingParams(temperature=0, max_tokens=4)
    core.add(GenerateRequest(request_id="r", prompt=(1, 2, 3), params=params))
    while core.has_work:
        core.step()
    assert not late
