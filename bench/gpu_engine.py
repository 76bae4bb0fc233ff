"""The engine on a GPU: steps, prompts, whole loads and first tokens of the 1.42 B shape.

    python bench/gpu_engine.py [steps] [load] [prefix] [profile] [deterministic] [start]

Needs no installation: it links the rooms into a temporary package. Weights are random (hidden 2048,
24 layers, 16 heads of 128, SwiGLU 5504, vocabulary 100352, tied), plain and with low-rank
convolutions; everything runs as the engine runs it, scheduler, copies, sampling, overlap and all.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field
from typing import Any

import _import  # noqa: F401  (makes `convserve` importable)
import torch
from convserve.cache import CacheSizes
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models.config import parse_config
from convserve.engine.models.decoder import Decoder
from convserve.engine.resolve import Limits
from convserve.kernels import select_ops
from torch_step import torch_step_ms

CUDA = torch.device("cuda")
QKV = ["q", "k", "v"]
PLACEMENTS = {"plain": None, "q k v": QKV, "all": [*QKV, "o", "gate", "up", "down"]}
BANDWIDTH = 3.108e12
"""Bytes per second that a read of this device's memory reaches."""


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


def random_model(kind: str, backend: Any = "auto") -> tuple[Decoder, int]:
    """The 1.42 B shape with convolutions after the named projections, and its bytes of weights."""
    placement = PLACEMENTS[kind]
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
    ops = select_ops(CUDA, backend)
    model = Decoder(ops, config, reader, torch.bfloat16, CUDA)  # pyright: ignore[reportArgumentType]
    return model, reader.total_elements * 2


def prompt(length: int) -> tuple[int, ...]:
    """Random token ids."""
    return tuple(torch.randint(0, 100000, (length,)).tolist())


def core_of(
    model: Decoder, seqs: int, length: int, budget: int = 1024, tails: int = 0, **options: Any
) -> EngineCore:
    """An engine for so many sequences of at most `length` tokens."""
    sizes = CacheSizes(seqs * -(-length // 16) + 8, 16, seqs, model.state_spec.ring_len(), tails)
    return EngineCore(model, Limits(sizes, length, budget, 0), (), CUDA, **options)


def generating(model: Decoder, batch: int, context: int, **options: Any) -> EngineCore:
    """An engine in which `batch` sequences have begun to generate, to be of that context on average
    over the next 120 steps."""
    core = core_of(model, batch, context + 192, prefix_caching=False, **options)
    # Prompts are computed in turn, and the earlier ones generate meanwhile: they are shorter.
    lengths = [context - 64.0]
    for others in range(batch - 1, 0, -1):
        rate = core.limits.max_batch_tokens - others
        lengths.append(lengths[-1] - lengths[-1] / rate)
    for i, length in enumerate(reversed(lengths)):
        tokens = prompt(round(length))
        params = SamplingParams(temperature=0, max_tokens=context + 192 - len(tokens))
        core.add(GenerateRequest(request_id=str(i), prompt=tokens, params=params))
    while core.stats().step_tokens != batch or core.stats().steps < 4:
        core.step()
    for _ in range(3):
        core.step()
    return core


@dataclass
class Window:
    """What successive steps took."""

    ms: list[float] = field(default_factory=list)
    """Between the results of one and the next, as a client sees them."""
    host_us: list[float] = field(default_factory=list)
    """Planning and committing."""
    idle_ms: float = 0.0
    """The device without work."""

    @property
    def median(self) -> float:
        """Milliseconds of a step."""
        return statistics.median(self.ms)

    def run(self, core: EngineCore, count: int) -> Window:
        """Adds so many steps."""
        for _ in range(3):  # the device may have stood idle for another engine's sake
            core.step()
        idle = core.stats().gpu_idle_seconds
        last = time.perf_counter()
        for _ in range(count):
            core.step()
            now = time.perf_counter()
            self.ms.append((now - last) * 1e3)
            last = now
            self.host_us.append(core.stats().scheduler_seconds * 1e6)
        self.idle_ms += (core.stats().gpu_idle_seconds - idle) * 1e3
        return self


def steps(batches: tuple[int, ...] = (1, 8, 32, 64, 128, 256), context: int = 1024) -> None:
    """Steps while all sequences generate: every kind in turn, several times, in one process."""
    models = {kind: random_model(kind) for kind in PLACEMENTS}
    for batch in batches:
        kinds = [k for k in PLACEMENTS if k != "all" or batch <= 64]
        windows = {kind: Window() for kind in kinds}
        started = time.perf_counter()
        # In turn where their keys and values fit beside each other.
        for group in [kinds] if batch <= 64 else [[kind] for kind in kinds]:
            cores = {kind: generating(models[kind][0], batch, context) for kind in group}
            for _ in range(4):
                for kind in group:
                    windows[kind].run(cores[kind], 25)
            del cores
            gc.collect()
            torch.cuda.empty_cache()
        took = time.perf_counter() - started
        model, weights = models["plain"]
        floor = (weights + model.state_spec.kv_bytes_per_token * context * batch) / BANDWIDTH * 1e3
        text = "  ".join(
            f"{kind} {w.median:6.3f} [{sorted(w.ms)[10]:.3f} {sorted(w.ms)[-10]:.3f}] "
            f"{w.median / floor:4.2f}x idle {w.idle_ms / sum(w.ms):.1%} "
            f"host {statistics.median(w.host_us):.0f} us (mean {statistics.mean(w.host_us):.0f})"
            for kind, w in windows.items()
        )
        base = torch_step_ms(batch, context) if batch <= 128 else math.nan
        torch.cuda.empty_cache()
        print(
            f"step ms, batch {batch:3}, context {context}: floor {floor:5.2f}  torch {base:6.3f}  "
            f"{text}  ({took:.1f} s)",
            flush=True,
        )


def load(counts: tuple[int, ...] = (64, 256), budget: int = 2048) -> None:
    """Whole loads: so many prompts of 256 tokens at once, 128 tokens each."""
    for kind in ("plain", "q k v"):
        model, _ = random_model(kind)
        for count in counts:
            started = time.perf_counter()
            core = core_of(model, count, 400, budget, prefix_caching=False)
            ready = time.perf_counter() - started
            rates: list[float] = []
            params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
            for _ in range(3):
                requests = [
                    GenerateRequest(request_id=str(i), prompt=prompt(256), params=params)
                    for i in range(count)
                ]
                started = time.perf_counter()
                for request in requests:
                    core.add(request)
                while core.has_work:
                    core.step()
                rates.append(count * 128 / (time.perf_counter() - started))
            print(
                f"load {kind:6} {count} x (256 + 128): "
                f"{', '.join(f'{r:,.0f}' for r in rates)} output tok/s; graphs in {ready:.1f} s",
                flush=True,
            )
            del core
            torch.cuda.empty_cache()


def prefix(length: int = 2048) -> None:
    """Time to the first token of a long prompt, cold and with all but its end cached."""
    model, _ = random_model("q k v")
    params = SamplingParams(temperature=0, max_tokens=1)
    for tails in (64, 0):
        core = core_of(model, 8, 4096, 2048, tails)

        def once(tokens: tuple[int, ...], core: EngineCore = core) -> float:
            torch.cuda.synchronize()
            started = time.perf_counter()
            core.add(GenerateRequest(request_id="r", prompt=tokens, params=params))
            while core.has_work:
                core.step()
            return (time.perf_counter() - started) * 1e3

        times: dict[str, list[float]] = {"128 cold": [], "cold": [], "first hit": [], "later": []}
        for turn in range(13):
            shared = prompt(length)
            took = {
                "128 cold": once(prompt(128)),
                "cold": once(shared),
                "first hit": once(shared + prompt(16)),
                "later": once(shared + prompt(16)),
            }
            if turn >= 3:  # the first ones compile what has no graph
                for name, ms in took.items():
                    times[name].append(ms)
        text = ", ".join(f"{name} {statistics.median(t):.2f}" for name, t in times.items())
        print(f"first token ms, {length} + 16 tokens, {tails} tails: {text}", flush=True)
        del core, once
        torch.cuda.empty_cache()


def deterministic(context: int = 1024) -> None:
    """What one way to multiply and to attend costs."""
    for backend in ("auto", "deterministic"):
        model, _ = random_model("q k v", backend)
        for batch in (1, 32, 64):
            core = generating(model, batch, context)
            ms = Window().run(core, 50).median
            print(f"{backend:14} batch {batch:3}: step {ms:.3f} ms", flush=True)
            del core
            torch.cuda.empty_cache()


def profile(context: int = 1024) -> None:
    """Where the time of a step goes: kernels by share, and how long the device stands idle."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as trace

    model, _ = random_model("q k v")
    for batch in (1, 8, 64):
        core = generating(model, batch, context)
        Window().run(core, 5)
        torch.cuda.synchronize()
        with trace(activities=[ProfilerActivity.CUDA]) as traced:
            started = time.perf_counter()
            for _ in range(20):
                core.step()
            torch.cuda.synchronize()
            wall = time.perf_counter() - started
        rows = sorted(traced.key_averages(), key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in rows) / 1e6
        print(f"batch {batch}: {wall / 20 * 1e3:.3f} ms a step, device busy {busy / wall:.1%}")
        for e in rows[:22]:
            print(
                f"  {e.self_device_time_total / 20:8.1f} us {e.count / 20:6.1f} x  {e.key[:90]}",
                flush=True,
            )
        del core
        torch.cuda.empty_cache()


def start(seqs: int = 256, length: int = 4096) -> None:
    """Until an engine of the default size could take its first request, weights being there: every
    kernel compiled, or taken from TRITON_CACHE_DIR, and every graph captured."""
    model, _ = random_model("q k v")
    started = time.perf_counter()
    core = core_of(model, seqs, length // 8, 2048, 64)
    print(f"ready in {time.perf_counter() - started:.1f} s", flush=True)
    del core


def main() -> int:
    """Runs the named parts, or steps, load and prefix."""
    parts = {f.__name__: f for f in (steps, load, prefix, profile, deterministic, start)}
    wanted = sys.argv[1:] or ["steps", "load", "prefix"]
    if unknown := set(wanted) - set(parts):
        print(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
        return 2
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    failed = 0
    for name in wanted:
        try:
            parts[name]()
        except Exception:
            failed += 1
            print(name, "FAILED\n", traceback.format_exc(limit=-8), flush=True)
        torch.cuda.empty_cache()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
