"""Hybrid families on a GPU: golden checkpoints, the recurrent ops, and the engine's own steps.

    python bench/hybrids.py [golden] [ops] [steps] [load] [profile] [--tiny] [--device cpu]

Needs no installation. Jet-Nemotron-2B and LFM2-1.2B are their published shapes with random weights;
everything runs as the engine runs it. Floors are bytes over the bandwidth that a read reaches:
weights once, keys and values that attention sees, recurrent state in and out, conv windows.
`--tiny` shrinks the shapes, to try the script out where there is no GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _import  # noqa: F401  (makes `convserve` importable)
import torch
from convserve.cache import CacheSizes
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import load_model
from convserve.engine.models.config import parse_config
from convserve.engine.models.decoder import Decoder
from convserve.engine.models.mixers import Attention
from convserve.engine.resolve import Limits
from convserve.kernels import select_ops
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Callable

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden" / "models"
BANDWIDTH = 3.108e12
"""Bytes per second that a read of an H100's memory reaches."""

JET_ATTENTION = {14: "attn", 19: "attn", 20: "swa", 21: "swa"}
JET: dict[str, Any] = {
    "model_type": "jet_nemotron",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "layer_types": [JET_ATTENTION.get(i, "jet") for i in range(28)],
    "efficient_attention_config": {
        "jet": {"expand_v": 2.6666666667, "num_heads": 12, "head_dim": 96, "conv_size": 4},
        "swa": {"window_size": 1152},
    },
}
LFM2: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "intermediate_size": 12288,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
FAMILIES = ("hf_lfm2", "hf_mamba2", "hf_qwen3_next", "jet_nemotron_tiny")
SHAPES = {"Jet-Nemotron-2B": JET, "LFM2-1.2B": LFM2}


class RandomReader:
    """Stands where a CheckpointReader does, with random weights of any name."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.total_elements = 0

    def __contains__(self, name: str) -> bool:
        return False

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A random tensor, scaled so that activations keep their size."""
        self.total_elements += torch.Size(shape).numel()
        dtype = dtype or self._dtype
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=self._device)
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        return torch.randn(shape, dtype=dtype, device=self._device) * scale


class Bench:
    """The parts, on one device."""

    def __init__(self, device: torch.device, tiny: bool, only: str) -> None:
        self.device, self.tiny = device, tiny
        self.shapes = [name for name in SHAPES if only in name]
        self.families = [name for name in FAMILIES if only in name]
        self.dtype = torch.bfloat16
        self.counts = (1, 2) if tiny else (1, 8, 64)

    def model(self, name: str) -> tuple[Decoder, int]:
        """A random model, and its bytes of weights."""
        raw = dict(SHAPES[name])
        if self.tiny:
            raw |= {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256}
            raw |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        reader = RandomReader(self.dtype, self.device)
        model = Decoder(
            select_ops(self.device),
            parse_config(raw),
            reader,  # pyright: ignore[reportArgumentType]
            self.dtype,
            self.device,
        )
        return model, reader.total_elements * self.dtype.itemsize

    def core(self, model: Decoder, seqs: int, tokens: int, longest: int, tails: int) -> EngineCore:
        """An engine for so many sequences with `tokens` tokens in all."""
        sizes = CacheSizes(
            -(-tokens // 16) + seqs + 8, 16, seqs, model.state_spec.ring_len(), tails
        )
        budget = 64 if self.tiny else 1024
        return EngineCore(
            model, Limits(sizes, longest, budget, 0), (), self.device, prefix_caching=tails > 0
        )

    def golden(self) -> None:
        """Greedy tokens of the golden checkpoints through the whole engine, cold and from cache."""
        for name in self.families:
            for dtype in (torch.float32, torch.bfloat16):
                attempt(f"golden {name} {dtype}", lambda n=name, d=dtype: self._golden(n, d))

    def _golden(self, name: str, dtype: torch.dtype) -> None:
        model = load_model(GOLDEN / name, dtype, self.device)
        expected = load_file(GOLDEN / name / "expected.safetensors")
        parts: list[str] = []
        for budget, graphs in ((3, False), (64, True)):
            sizes = CacheSizes(64, 16, 4, model.state_spec.ring_len(), 8)
            core = EngineCore(
                model, Limits(sizes, 256, budget, 0), (), self.device, graphs=graphs, poison=True
            )
            for turn in ("cold", "again"):
                tokens = generate(core, [expected[f"p{i}.input_ids"].tolist() for i in range(3)])
                same = sum(
                    a == b
                    for i in range(3)
                    for a, b in zip(tokens[i], expected[f"p{i}.greedy"].tolist(), strict=True)
                )
                parts.append(f"{turn} {same}/48")
            parts.append(f"hits {core.stats().prefix_hits}")
        print(f"golden {name:18} {dtype!s:15} {', '.join(parts)}", flush=True)

    def steps(self) -> None:
        """Milliseconds of a step while all sequences generate, by batch and context."""
        for name in self.shapes:
            attempt(f"steps {name}", lambda n=name: self._steps(n))

    def _steps(self, name: str) -> None:
        model, weights = self.model(name)
        short, long = (40, 90) if self.tiny else (768, 32768)
        started = time.perf_counter()
        tokens = max(self.counts[-1] * (short + 256), self.counts[1] * (long + 512))
        core = self.core(model, self.counts[-1], tokens, long + 512, 0)
        print(f"{name}: engine made in {time.perf_counter() - started:.1f} s", flush=True)
        for context, counts, output in (
            (short, self.counts, 255),
            (long, self.counts[:2], 500),
        ):
            for count in counts:
                prefill = count * context / self._begin(core, count, context, output)
                times = self._window(core, 10 if self.tiny else 60)
                core.abort_all()
                while core.has_work:
                    core.step()
                floor = self.floor_ms(model, weights, count, context)
                ms = statistics.median(times)
                print(
                    f"step {name:16} batch {count:3} context {context:6}: {ms:7.3f} ms "
                    f"[{min(times):.3f} {max(times):.3f}], floor {floor:6.3f} ms "
                    f"({ms / floor:4.2f}x); prefill {prefill:9,.0f} tok/s",
                    flush=True,
                )

    def _begin(self, core: EngineCore, count: int, context: int, output: int) -> float:
        """Starts so many sequences and runs until all generate; seconds until then."""
        params = SamplingParams(temperature=0, max_tokens=output)
        for i in range(count):
            ids = torch.randint(0, 500, (context,)).tolist()
            core.add(GenerateRequest(request_id=str(i), prompt=tuple(ids), params=params))
        started, steps = time.perf_counter(), core.stats().steps
        while core.stats().step_tokens != count or core.stats().steps < steps + 4:
            core.step()
        took = time.perf_counter() - started
        for _ in range(3):
            core.step()
        assert core.stats().running == count, "a sequence ended before all had begun"
        return took

    def _window(self, core: EngineCore, count: int) -> list[float]:
        times: list[float] = []
        core.step()
        last = time.perf_counter()
        for _ in range(count):
            core.step()
            now = time.perf_counter()
            times.append((now - last) * 1e3)
            last = now
        return times

    def floor_ms(self, model: Decoder, weights: int, count: int, context: int) -> float:
        """The time to move what a step must move."""
        c, spec = model.config, model.state_spec
        seen = sum(min(context, m.window or context) for m in c.mixers if isinstance(m, Attention))
        kv = seen * 2 * c.kv_width * self.dtype.itemsize
        windows = replace(spec, layers=tuple(replace(s, recurrent=None) for s in spec.layers))
        state = 2 * spec.recurrent_bytes + windows.tail_bytes
        return (weights + count * (kv + state)) / BANDWIDTH * 1e3

    def load(self) -> None:
        """Whole loads: 64 prompts of 256 tokens at once, 128 tokens each, prefix caching on."""
        for name in self.shapes:
            attempt(f"load {name}", lambda n=name: self._load(n))

    def _load(self, name: str) -> None:
        model, _ = self.model(name)
        count, prompt, output = (2, 20, 5) if self.tiny else (64, 256, 128)
        core = self.core(model, count, count * (prompt + output), prompt + output + 8, 64)
        rates: list[float] = []
        for _ in range(3):
            prompts = [torch.randint(0, 500, (prompt,)).tolist() for _ in range(count)]
            started = time.perf_counter()
            generate(core, prompts, output)
            rates.append(count * output / (time.perf_counter() - started))
        text = ", ".join(f"{r:,.0f}" for r in rates)
        print(f"load {name:16} {count} x ({prompt} + {output}): {text} output tok/s", flush=True)

    def profile(self) -> None:
        """Which kernels a step is made of."""
        for name in self.shapes:
            for count in self.counts[:2]:
                attempt(f"profile {name}", lambda n=name, c=count: self._profile(n, c))

    def _profile(self, name: str, count: int) -> None:
        model, _ = self.model(name)
        core = self.core(model, count, count * 1024, 1024, 0)
        self._begin(core, count, 40 if self.tiny else 768, 200)
        turns = 10
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as trace:
            self._window(core, turns - 1)
        totals = trace.key_averages()

        def cost(event: Any) -> float:
            is_cuda = self.device.type == "cuda"
            return event.self_device_time_total if is_cuda else event.self_cpu_time_total

        print(f"profile {name} batch {count}: us of a step, calls, kernel")
        for event in sorted(totals, key=cost, reverse=True)[:14]:
            each = f"{cost(event) / turns:9.1f} {event.count / turns:7.1f}"
            print(f"  {each}  {event.key[:70]}", flush=True)

    def ops(self) -> None:
        """Recurrent ops alone, every candidate launch shape, state of more sets than L2 holds."""
        from convserve.kernels import triton_recurrent

        step_tile, chunk_tile = triton_recurrent.step_tile, triton_recurrent.chunk_tile
        for heads, key, value in ((12, 96, 256), (32, 128, 128)):
            for count in self.counts:
                parts: list[str] = []
                for tile in (None, *STEP_TILES):
                    triton_recurrent.step_tile = _fixed(tile) if tile else step_tile
                    us = attempt(str(tile), partial(self._delta, heads, key, value, count, 1))
                    parts.append(f"{tile or 'table'} {us:.1f}" if us else f"{tile} -")
                floor = 2 * count * heads * key * value * 4 / BANDWIDTH * 1e6
                text = ", ".join(parts)
                print(f"delta step {heads}x{key}x{value} batch {count}: floor {floor:.1f}; {text}")
            triton_recurrent.step_tile = step_tile
            for count, rows in ((1, 2048), (8, 256)):
                parts = []
                for tile in CHUNK_TILES:
                    triton_recurrent.chunk_tile = _fixed(tile)
                    us = attempt(str(tile), partial(self._delta, heads, key, value, count, rows))
                    parts.append(f"{tile} {us:.0f}" if us else f"{tile} -")
                text = ", ".join(parts)
                print(f"delta chunk {heads}x{key}x{value}, {count} x {rows} rows: {text}")
            triton_recurrent.chunk_tile = chunk_tile

    def _delta(self, heads: int, key: int, value: int, count: int, rows: int) -> float:
        from convserve.kernels import DeltaParts, FlatBatch, triton_recurrent

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=self.device)

        wide = torch.float32
        parts = DeltaParts(
            heads, heads, key, value, (True, True, False), -normal(heads, dtype=wide).abs(),
            normal(heads, dtype=wide), normal(value), 1e-5,
        )  # fmt: skip
        total = count * rows
        columns = normal(total, sum(parts.widths) + heads * value + 2 * heads)
        qkv = columns[:, : sum(parts.widths)]
        gate = columns[:, sum(parts.widths) :][:, : heads * value]
        b, a = columns[:, -2 * heads :].chunk(2, dim=1)
        arange = torch.arange(count, dtype=torch.int32, device=self.device)
        sets = max(2, min(64, 220_000_000 // (count * heads * key * value * 4)))
        states = normal(sets, count + 1, heads, key, value, dtype=wide)
        batch = FlatBatch(
            positions=torch.arange(rows, device=self.device).repeat(count) + 100,
            row_seq=arange.repeat_interleave(rows),
            starts=torch.full_like(arange, 100),
            offsets=torch.arange(0, total + 1, rows, dtype=torch.int32, device=self.device),
            slots=arange + 1,
            pages=torch.zeros((count, 1), dtype=torch.int32, device=self.device),
            kv_rows=torch.zeros(total, dtype=torch.int64, device=self.device),
            ring_rows=torch.zeros(total, dtype=torch.int64, device=self.device),
            ring_len=4,
            max_rows=rows,
            max_len=100 + rows,
        )

        def call(state: torch.Tensor) -> None:
            triton_recurrent.delta_rule(parts, qkv, None, None, None, gate, b, a, state, batch)

        return graph_us([lambda s=s: call(s) for s in states.unbind(0)])


STEP_TILES = (
    (32, 1, 1), (32, 1, 2), (32, 1, 4), (64, 1, 2), (64, 1, 4), (64, 1, 8), (128, 1, 4),
    (128, 1, 8), (64, 4, 8), (64, 4, 16), (32, 8, 4), (32, 8, 8), (256, 1, 8), (256, 1, 16),
)  # fmt: skip


CHUNK_TILES = ((16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (64, 8))


def _fixed(tile: tuple[int, ...]) -> Callable[..., Any]:
    return lambda *_: tile


def graph_us(calls: list[Callable[[], None]]) -> float:
    """Microseconds a call, chained in one graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(7):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def generate(core: EngineCore, prompts: list[list[int]], count: int = 16) -> list[list[int]]:
    """Greedy tokens of each prompt, all at once."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        core.add(GenerateRequest(request_id=str(i), prompt=tuple(prompt), params=params))
    while core.has_work:
        for event in core.step():
            tokens[int(event.request_id)] += event.token_ids
    return tokens


def attempt(name: str, part: Callable[[], Any]) -> Any:
    """Runs a part; a failure is printed and does not stop the others."""
    try:
        return part()
    except Exception:
        print(name, "FAILED\n", traceback.format_exc(limit=-3), flush=True)
        return None
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def main() -> None:
    """Runs the parts that were named, or all."""
    names = ("golden", "ops", "steps", "load", "profile")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*names, []], help="all if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="models whose names hold this")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    bench = Bench(device, args.tiny, args.only)
    for name in args.parts or names:
        started = time.perf_counter()
        getattr(bench, name)()
        print(f"-- {name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
