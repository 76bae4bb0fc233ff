"""Hybrid families on a GPU: golden checkpoints, and the engine's own steps.

    python bench/hybrids.py [golden] [chain] [steps] [load] [profile] [--only NAME] [--counts 1 8]

Needs no installation. Jet-Nemotron-2B and LFM2-1.2B are their published shapes with random weights.
chain: the kernels of a step in a graph, without an engine around them. profile: what each of them
takes of it. steps: the engine as it runs, with graphs for the measured sizes alone, prompts
included. Floors are bytes over the bandwidth that a read reaches: weights once, keys and values
that attention sees, recurrent state in and out, conv windows. `--tiny` shrinks the shapes, to try
the script out where there is no GPU.
`hybrid_layers.py` has single layers, beside other people's kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import _import  # noqa: F401  (makes `convserve` importable)
import torch
from captured import captured, report_kernels
from convserve.cache import CacheSizes
from convserve.cache.storage import CacheStorage
from convserve.engine import graphs
from convserve.engine.models import ForwardBatch, load_model
from convserve.engine.models.config import parse_config
from convserve.engine.models.decoder import Decoder
from convserve.engine.models.mixers import Attention
from convserve.engine.resolve import Limits
from convserve.kernels import FlatBatch, select_ops
from convserve.kernels.triton_compile import compiling
from hybrid_cases import (
    BANDWIDTH,
    SHAPES,
    RandomReader,
    attempt,
    graph_times,
)
from safetensors.torch import load_file

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from convserve.cache import LayerState
    from convserve.engine.core import EngineCore
    from convserve.engine.staging import StepShape

GOLDEN = Path(__file__).parent.parent / "tests" / "data" / "golden" / "models"
FAMILIES = ("hf_lfm2", "hf_mamba2", "hf_qwen3_next", "jet_nemotron_tiny")


class Bench:
    """The parts, on one device."""

    def __init__(self, device: torch.device, args: argparse.Namespace) -> None:
        self.device, self.tiny, self.compilers = device, args.tiny, args.compilers
        self.shapes = [name for name in SHAPES if args.only in name]
        self.families = [name for name in FAMILIES if args.only in name]
        self.dtype = torch.bfloat16
        self.counts = [1, 2] if self.tiny else args.counts
        short, long = (40, 90) if self.tiny else (1024, 32768)
        self.cells = [(n, short) for n in self.counts] + [(n, long) for n in self.counts if n <= 8]

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
        from convserve.engine.core import EngineCore

        sizes = CacheSizes(
            -(-tokens // 16) + seqs + 8, 16, seqs, model.state_spec.ring_len(), tails
        )
        limits = Limits(sizes, longest, 64 if self.tiny else 1024, 0)
        started = time.perf_counter()
        self.compile_steps(model, limits)
        compiled = time.perf_counter()
        core = EngineCore(model, limits, (), self.device, prefix_caching=tails > 0)
        print(
            f"engine for {seqs} sequences: kernels compiled in {compiled - started:.1f} s, "
            f"graphs captured in {time.perf_counter() - compiled:.1f} s",
            flush=True,
        )
        return core

    def compile_steps(self, model: Decoder, limits: Limits) -> None:
        """Compiles every kernel that the graphs of an engine will hold."""
        sizes = replace(limits.sizes, num_pages=16, num_tails=0)
        if self.device.type != "cuda":
            return
        state = CacheStorage(model.state_spec, sizes, self.device).layers
        with torch.inference_mode(), self.compiler():
            for shape in graphs.shapes(limits):
                block = torch.zeros(shape.num_bytes, dtype=torch.uint8, device=self.device)
                model.ops.argmax(model.forward(shape.batch(block, state)))
        torch.cuda.synchronize()

    def compiler(self) -> AbstractContextManager[bool]:
        """Compiles what runs inside."""
        return compiling() if self.device.type == "cuda" else nullcontext(False)

    def golden(self) -> None:
        """Greedy tokens of the golden checkpoints through the whole engine, cold and from cache."""
        for name in self.families:
            for dtype in (torch.float32, torch.bfloat16):
                attempt(f"golden {name} {dtype}", lambda n=name, d=dtype: self._golden(n, d))

    def _golden(self, name: str, dtype: torch.dtype) -> None:
        from convserve.engine.core import EngineCore

        model = load_model(GOLDEN / name, dtype, self.device)
        expected = load_file(GOLDEN / name / "expected.safetensors")
        parts: list[str] = []
        for budget, has_graphs in ((3, False), (64, True)):
            sizes = CacheSizes(64, 16, 4, model.state_spec.ring_len(), 8)
            core = EngineCore(
                model,
                Limits(sizes, 256, budget, 0),
                (),
                self.device,
                graphs=has_graphs,
                poison=True,
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

    def chain(self) -> None:
        """Milliseconds of the kernels of a step, token ids to token ids, by batch and context."""
        for name in self.shapes:
            attempt(f"chain {name}", lambda n=name: self._chain(n), 150)

    def _chain(self, name: str) -> None:
        model, weights, batches = self.prepared(name)
        for (count, context), batch in zip(self.cells, batches, strict=True):
            attempt(name, partial(self._chain_cell, name, model, weights, count, context, batch))

    def prepared(self, name: str) -> tuple[Decoder, int, list[ForwardBatch]]:
        """A model, its bytes of weights, and a decode step of each cell, compiled."""
        started = time.perf_counter()
        model, weights = self.model(name)
        most, ring_len = max(self.counts), model.state_spec.ring_len()
        tokens = max(n * context for n, context in self.cells)
        sizes = CacheSizes(tokens // 16 + 2 * most, 16, most, ring_len, 0)
        state = CacheStorage(model.state_spec, sizes, self.device).layers
        for layer in state:
            for tensor in (layer.k_pages, layer.v_pages, layer.recurrent, *layer.rings.values()):
                if tensor is not None:
                    tensor.normal_()
        batches = [self.batch(*cell, ring_len, state) for cell in self.cells]
        loaded = time.perf_counter()
        with torch.inference_mode(), self.compiler():
            for batch in batches:
                model.ops.argmax(model.forward(batch))
        compiled = time.perf_counter()
        print(
            f"{name}: loaded in {loaded - started:.1f} s, compiled in {compiled - loaded:.1f} s",
            flush=True,
        )
        return model, weights, batches

    def _chain_cell(
        self, name: str, model: Decoder, weights: int, count: int, context: int, batch: ForwardBatch
    ) -> None:
        with torch.inference_mode():
            if self.device.type != "cuda":
                model.ops.argmax(model.forward(batch))
                return
            times = graph_times([lambda: model.ops.argmax(model.forward(batch))], 30)
        ms, floor = statistics.median(times) / 1e3, self.floor_ms(model, weights, count, context)
        print(
            f"chain {name:16} batch {count:3} context {context:6}: {ms:7.3f} ms "
            f"[{min(times) / 1e3:.3f} {max(times) / 1e3:.3f}], floor {floor:6.3f} ms "
            f"({ms / floor:4.2f}x)",
            flush=True,
        )

    def batch(
        self, count: int, context: int, ring_len: int, state: tuple[LayerState, ...]
    ) -> ForwardBatch:
        """One token of each of so many sequences with `context` tokens before it."""
        columns = context // 16 + 1
        seqs = torch.arange(count, dtype=torch.int32, device=self.device)
        pages = torch.arange(count * columns, dtype=torch.int32, device=self.device) + 1
        pages = pages.view(count, columns)
        rows = seqs.long()
        flat = FlatBatch(
            positions=torch.full_like(rows, context),
            row_seq=seqs,
            starts=torch.full_like(seqs, context),
            offsets=torch.arange(count + 1, dtype=torch.int32, device=self.device),
            slots=seqs + 1,
            pages=pages,
            kv_rows=pages[:, -1].long() * 16 + context % 16,
            ring_rows=(rows + 1) * ring_len + context % ring_len,
            ring_len=ring_len,
            max_rows=1,
            max_len=context + 1,
            spans=None if self.device.type == "cuda" else ((context, 1),) * count,
        )
        return ForwardBatch(torch.randint_like(rows, 0, 500), flat, state, rows)

    def steps(self) -> None:
        """Milliseconds of an engine's step while all sequences generate, by batch and context."""
        models = {name: self.model(name) for name in self.shapes}
        for cell in self.cells:
            for name, model in models.items():
                attempt(name, partial(self._steps_cell, name, *model, *cell), 90)

    def _steps_cell(
        self, name: str, model: Decoder, weights: int, count: int, context: int
    ) -> None:
        output = 45 if self.tiny else 250
        context -= output // 2  # it grows while it is measured
        core = self.core(model, count, count * (context + output), context + output, 0)
        prefill = count * context / self._begin(core, count, context, output)
        times = self._window(core, 10 if self.tiny else 60)
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
        from convserve.engine.messages import GenerateRequest, SamplingParams

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
        """Which kernels the chain of a step is made of."""
        for name in self.shapes:
            attempt(f"profile {name}", lambda n=name: self._profile(n), 150)

    def _profile(self, name: str) -> None:
        model, _, batches = self.prepared(name)
        for (count, context), batch in zip(self.cells, batches, strict=True):
            if self.device.type == "cuda" and context <= 1024:
                with torch.inference_mode():
                    graph = captured([lambda b=batch: model.ops.argmax(model.forward(b))])
                report_kernels(f"{name} batch {count}", graph.replay, 10)


def generate(core: EngineCore, prompts: list[list[int]], count: int = 16) -> list[list[int]]:
    """Greedy tokens of each prompt, all at once."""
    from convserve.engine.messages import GenerateRequest, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        core.add(GenerateRequest(request_id=str(i), prompt=tuple(prompt), params=params))
    while core.has_work:
        for event in core.step():
            tokens[int(event.request_id)] += event.token_ids
    return tokens


def only_measured(limits: Limits) -> list[StepShape]:
    """In place of `graphs.shapes`: the full batch at the longest context, and full chunks."""
    most, longest = limits.sizes.num_slots, limits.max_model_len
    return [
        s
        for s in ALL_SHAPES(limits)
        if (s.seqs == most and s.max_len == longest and s.max_rows == 1)
        or s.rows == limits.max_batch_tokens
    ]


ALL_SHAPES = graphs.shapes


def main() -> None:
    """Runs the parts that were named, or all."""
    names = ("golden", "chain", "steps", "load", "profile")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*names, []], help="all if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="models whose names hold this")
    parser.add_argument("--compilers", type=int, default=os.cpu_count(), help="threads")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    bench = Bench(device, args)
    for name in args.parts or names:
        graphs.shapes = only_measured if name == "steps" else ALL_SHAPES
        started = time.perf_counter()
        getattr(bench, name)()
        print(f"-- {name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
