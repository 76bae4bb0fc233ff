"""Where the engine's step takes longer than its kernels: both in one process, on one CUDA device.

    python bench/step_profile.py [--kinds plain "q k v" all] [--batches 1 8 32 64 128]

First, milliseconds a step, from the bare kernels to the engine, each line with one thing more: the
bench's step, eight in one graph and one in one graph, over keys and values that rotate and over
some of every layer's own; the engine's graph, replayed alone; with the upload and the copy of
tokens; the engine. Then, from the profiler, which kernels either is made of.

Prompts are not computed: keys, values and rings are random, every sequence has the same length, and
the context is that of the table at the middle of the measured steps.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _import  # noqa: F401
import gpu_engine
import kernel_steps
import torch
from captured import captured, report_kernels
from convserve.engine import graphs
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.output import Output
from convserve.engine.reports import to_host
from convserve.kernels.triton_compile import compiling
from kernel_cases import DIM, HEADS, make_batch, normal

if TYPE_CHECKING:
    from collections.abc import Callable

    from convserve.engine.core import EngineCore
    from convserve.engine.models.decoder import Decoder
    from convserve.engine.models.forward_batch import ForwardBatch
    from convserve.engine.resolve import Limits
    from convserve.engine.staging import StepShape

CONTEXT, HALF = 1024, 40
"""Context in the middle of the measured steps, and how many of them lie before it."""

all_shapes = graphs.shapes


def one_shape(limits: Limits) -> list[StepShape]:
    """The graph of steps in which every slot advances by one token, alone."""
    most, longest = limits.sizes.num_slots, limits.max_model_len
    return [s for s in all_shapes(limits) if (s.max_rows, s.rows, s.max_len) == (1, most, longest)]


def compile_step(model: Decoder, batch: int) -> None:
    """Every kernel of the engine's step; inside `compiling`."""
    core = gpu_engine.core_of(model, batch, CONTEXT + 2 * HALF, graphs=False)
    (shape,) = one_shape(core.limits)
    block = torch.zeros(shape.num_bytes, dtype=torch.uint8, device="cuda")
    with torch.inference_mode():
        core._runner._step(shape.batch(block, core._storage.layers))


def generating(model: Decoder, batch: int) -> EngineCore:
    """An engine in which `batch` sequences generate, HALF tokens before CONTEXT."""
    with patch.object(graphs, "shapes", one_shape):
        core = gpu_engine.core_of(
            model, batch, CONTEXT + 4 * HALF, batch * CONTEXT, prefix_caching=False
        )
    for layer in core._storage.layers:
        for state in (layer.k_pages, layer.v_pages, *layer.rings.values()):
            assert state is not None
            state.normal_()
    logits = torch.zeros(batch, model.config.vocab_size, dtype=torch.bfloat16, device=model.device)
    best = torch.randint(0, model.config.vocab_size, (batch,), device=model.device)

    def pretend(built: ForwardBatch) -> Output:
        count = len(built.logit_rows)
        return Output(logits[:count], best[:count], by_sequence=False)

    params = SamplingParams(temperature=0, max_tokens=4 * HALF)
    for i in range(batch):
        ids = gpu_engine.prompt(CONTEXT - HALF - 4)
        core.add(GenerateRequest(request_id=str(i), prompt=ids, params=params))
    with patch.object(core._runner, "forward", pretend):
        core.step()
    core._runner._last.random_(0, model.config.vocab_size)
    for _ in range(4):
        core.step()
    return core


def events_ms(call: Callable[[], object], count: int = 24) -> float:
    """Milliseconds a call, back to back, by events on the device; the best of three."""
    times: list[float] = []
    call()
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / count)
    return min(times)


def wall_ms(core: EngineCore, count: int) -> list[float]:
    """Milliseconds between the results of successive steps."""
    for _ in range(3):  # until the device is ahead of the host again
        core.step()
    times: list[float] = []
    last = time.perf_counter()
    for _ in range(count - 3):
        core.step()
        now = time.perf_counter()
        times.append((now - last) * 1e3)
        last = now
    return times


def bare_step(model: kernel_steps.Model, seqs: int, caches: int) -> Callable[[], object]:
    """The bench's step over so many caches of keys and values."""
    batch = make_batch(seqs, 1, CONTEXT - 1)
    pages = int(batch.pages.max()) + 1
    held = [(normal(pages, HEADS, 16, DIM), normal(pages, HEADS, 16, DIM)) for _ in range(caches)]
    return kernel_steps.whole_step(model, batch, held)


def engine_times(model: Decoder, batch: int) -> dict[str, float]:
    """Milliseconds by what is counted in."""
    core = generating(model, batch)
    built: list[ForwardBatch] = []
    forward = core._runner.forward

    def remembering(batch: ForwardBatch) -> Output:
        built[:] = [batch]
        return forward(batch)

    with patch.object(core._runner, "forward", remembering):
        times = wall_ms(core, HALF)
    held = core._runner._graphs
    graph = held.find(built[0]) if held is not None else None
    assert graph is not None
    line = {
        "graph": events_ms(graph.graph.replay),
        "with upload": events_ms(lambda: graph.replay(built[0])),
        "with tokens": events_ms(lambda: to_host(graph.replay(built[0]).best)),
    }
    times += wall_ms(core, HALF)
    line["engine"] = median(times)
    return line


def bare_times(model: kernel_steps.Model, batch: int) -> dict[str, float]:
    """The same of the bench's step."""
    line: dict[str, float] = {}
    size = batch * CONTEXT * HEADS * DIM * 4
    for name, caches in (("rotating", max(1, min(24, 220_000_000 // size))), ("own", 24)):
        step = bare_step(model, batch, caches)
        line[f"bare {name} x8"] = events_ms(captured([step] * 8).replay, 3) / 8
        line[f"bare {name}"] = events_ms(captured([step]).replay)
    return line


def print_times(kind: str, model: Decoder, bare: kernel_steps.Model | None, batch: int) -> None:
    """One line."""
    line = engine_times(model, batch)
    free()
    if bare is not None:
        line |= bare_times(bare, batch)
        free()
    text = "  ".join(f"{name} {ms:.3f}" for name, ms in line.items())
    print(f"{kind}, {batch} sequences, ms: {text}", flush=True)


def print_traces(kind: str, model: Decoder, bare: kernel_steps.Model | None, batch: int) -> None:
    """Tables of kernels."""
    print(f"{kind}, {batch} sequences, from the profiler:")
    report_kernels("the engine", generating(model, batch).step, 8)
    free()
    if bare is not None:
        report_kernels("the bare step", captured([bare_step(bare, batch, 24)]).replay, 8)
        free()


def free() -> None:
    """Gives memory back."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Compares the kinds and batch sizes asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=["plain", "q k v"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128])
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    for kind in options.kinds:
        model, _ = gpu_engine.random_model(kind)
        name = {"plain": "none", "q k v": "lowrank"}.get(kind)
        bare = None if name is None else kernel_steps.make_model(name)
        with compiling():
            for batch in options.batches:
                compile_step(model, batch)
                if bare is not None:
                    bare_step(bare, batch, 1)()
        # A profiler may slow what follows down, so it comes last.
        for printing in (print_times, print_traces):
            for batch in options.batches:
                printing(kind, model, bare, batch)
        del model, bare
        free()


if __name__ == "__main__":
    main()
