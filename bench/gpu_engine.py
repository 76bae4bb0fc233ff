"""The engine on a GPU: golden checkpoints against their numbers, then steps of the 1.42 B shape.

    python bench/gpu_engine.py [--skip-golden] [--skip-speed]

Needs no installation: it links the rooms into a temporary package. The model of the second part
has random weights (hidden 2048, 24 layers, 16 heads of 128, SwiGLU 5504, vocabulary 100352, tied),
plain and with low-rank q, k, v convolutions; steps run as the engine runs them, scheduler, copies
to the device, sampling and all.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from pathlib import Path

import _import  # noqa: F401  (makes `convserve` importable)
import torch
from convserve.cache import CacheSizes
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import load_model
from convserve.engine.models.config import parse_config
from convserve.engine.models.decoder import Decoder
from convserve.engine.resolve import Limits
from convserve.kernels import select_ops
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden" / "models"
MODELS = (
    "hf_llama",
    "hf_qwen3",
    "hf_olmoe",
    "static_qkv",
    "dynconv_lowrank_qkv",
    "dynconv_headwise_qkv",
    "dynconv_all_linear",
    "dynconv_moe_qkv",
)
CUDA = torch.device("cuda")


def main() -> int:
    """Runs every part; returns 1 if a golden checkpoint gave other tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-golden", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-prefix", action="store_true")
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    failures = 0
    if not args.skip_golden:
        for name in MODELS:
            for dtype in (torch.float32, torch.bfloat16):
                try:
                    failures += not golden(name, dtype)
                except Exception:
                    failures += 1
                    print(name, dtype, "FAILED\n", traceback.format_exc(limit=-4))
    if not args.skip_prefix:
        for tails in (64, 0):
            first_token(["q", "k", "v"], tails)
    if not args.skip_speed:
        for conv in (None, ["q", "k", "v"], ["q", "k", "v", "o", "gate", "up", "down"]):
            try:
                steps(conv)
            except Exception:
                print(conv, "FAILED\n", traceback.format_exc(limit=-6))
    return int(failures > 0)


def golden(name: str, dtype: torch.dtype) -> bool:
    """Greedy tokens of a checkpoint through the whole engine, at several chunk sizes."""
    model = load_model(GOLDEN / name, dtype, CUDA)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    same = total = 0
    for budget, graphs in ((1, True), (3, False), (7, True), (64, True), (64, False)):
        sizes = CacheSizes(64, 16, 4, model.state_spec.ring_len(), 4)
        limits = Limits(sizes, 256, budget, 0)
        core = EngineCore(model, limits, (), CUDA, graphs=graphs, poison=True)
        output: dict[str, list[int]] = {}
        for i in range(3):
            prompt = tuple(expected[f"p{i}.input_ids"].tolist())
            params = SamplingParams(temperature=0, max_tokens=16)
            core.add(GenerateRequest(request_id=str(i), prompt=prompt, params=params))
            output[str(i)] = []
        while core.has_work:
            for event in core.step():
                output[event.request_id] += event.token_ids
        for i in range(3):
            want = expected[f"p{i}.greedy"].tolist()
            same += sum(a == b for a, b in zip(output[str(i)], want, strict=True))
            total += len(want)
    print(f"golden {name:22} {dtype!s:15} {same} of {total} greedy tokens as expected")
    return dtype != torch.float32 or same == total


class RandomReader:
    """Stands where a CheckpointReader does, with random weights of any name."""

    total_elements = 0

    def __contains__(self, name: str) -> bool:
        return False

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A random tensor, scaled so that activations keep their size."""
        self.total_elements += torch.Size(shape).numel()
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype or torch.bfloat16, device=CUDA)
        scale = 0.02 if "dynamic_conv" in name else shape[-1] ** -0.5
        return torch.randn(shape, dtype=dtype or torch.bfloat16, device=CUDA) * scale


def random_model(placement: list[str] | None) -> tuple[Decoder, int]:
    """The 1.42 B shape with convolutions after the named projections, and its bytes of weights."""
    conv = {"kind": "lowrank", "width": 4, "rank": 16, "placement": placement}
    config = parse_config(
        {
            "model_type": "dynconv" if placement else "llama",
            "vocab_size": 100352,
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "conv": conv if placement else None,
        }
    )
    reader = RandomReader()
    ops = select_ops(CUDA)
    model = Decoder(ops, config, reader, torch.bfloat16, CUDA)  # pyright: ignore[reportArgumentType]
    return model, reader.total_elements * 2


def first_token(placement: list[str], tails: int, prefix: int = 2048) -> None:
    """Time to the first token of a long prompt, cold and with all but its end cached."""
    model, _ = random_model(placement)
    sizes = CacheSizes(1024, 16, 8, model.state_spec.ring_len(), tails)
    core = EngineCore(model, Limits(sizes, 4096, 2048, 0), (), CUDA)
    params = SamplingParams(temperature=0, max_tokens=1)

    def once(tokens: list[int]) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        core.add(GenerateRequest(request_id="r", prompt=tuple(tokens), params=params))
        while core.has_work:
            core.step()
        return (time.perf_counter() - started) * 1e3

    def tokens(count: int) -> list[int]:
        return torch.randint(0, 100000, (count,)).tolist()

    for _ in range(3):  # compiles every kernel that a cold prompt or a hit needs
        shared = tokens(prefix)
        for _ in range(3):
            once([*shared, *tokens(16)])
    cold: list[float] = []
    first: list[float] = []
    later: list[float] = []
    for _ in range(10):
        shared = tokens(prefix)
        cold.append(once([*shared, *tokens(16)]))
        first.append(once([*shared, *tokens(16)]))
        later.append(once([*shared, *tokens(16)]))
    print(
        f"first token, {prefix} + 16 tokens, {tails} tails of "
        f"{model.state_spec.conv_tail_bytes:,} bytes: cold {statistics.median(cold):.2f} ms, "
        f"first hit {statistics.median(first):.2f} ms, later hits {statistics.median(later):.2f} ms"
        f", {core.stats().replayed_tokens} tokens replayed",
        flush=True,
    )


def steps(placement: list[str] | None, context: int = 1024) -> None:
    """Median time of a step while all sequences generate, at several batch sizes."""
    model, weight_bytes = random_model(placement)
    name = "+".join(placement) if placement else "plain"
    for batch, graphs in ((1, False), (1, True), (8, True), (32, True), (64, True), (128, True)):
        sizes = CacheSizes(batch * (context // 16 + 8), 16, batch, model.state_spec.ring_len())
        limits = Limits(sizes, context + 112, 4096, 0)
        started = time.perf_counter()
        core = EngineCore(model, limits, (), CUDA, prefix_caching=False, graphs=graphs)
        ready = time.perf_counter() - started
        params = SamplingParams(temperature=0, max_tokens=100)
        for i in range(batch):
            prompt = tuple(torch.randint(0, 100000, (context,)).tolist())
            core.add(GenerateRequest(request_id=str(i), prompt=prompt, params=params))
        started = time.perf_counter()
        while core.stats().step_tokens != batch or core.stats().steps < 2:
            core.step()
        torch.cuda.synchronize()
        prefill = time.perf_counter() - started
        times: list[float] = []
        for _ in range(40):
            torch.cuda.synchronize()
            started = time.perf_counter()
            core.step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        kv = model.state_spec.kv_bytes_per_token * context * batch
        floor = (weight_bytes + kv) / 3.108e12
        median = statistics.median(times)
        print(
            f"step {name:24} batch {batch:3} context {context} {'graph' if graphs else 'eager'}: "
            f"{median * 1e3:7.2f} ms, floor {floor * 1e3:5.2f} ms ({median / floor:4.2f}x), "
            f"scheduler {core.stats().scheduler_seconds * 1e6:4.0f} us; "
            f"prefill {batch * context / prefill:9,.0f} tok/s; ready in {ready:.1f} s",
            flush=True,
        )
        del core
    del model
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
