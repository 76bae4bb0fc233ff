"""CPU figures side by side in one run: convserve, Hugging Face transformers, and the floor.

    python bench/cpu.py [MODEL FOLDER]        the default model if none is named

Decode: greedy tokens per second of 1, 4 and 16 sequences after prompts of 128 tokens. Prefill:
prompt tokens per second. Floor: bytes of weights over the measured read bandwidth of memory.
Each figure is the median of several runs, ours and theirs in turn.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from convserve.engine import LLM, SamplingParams
from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
SEQUENCES = (1, 4, 16)
RUNS = 3

Prompts = list[list[int]]


def main() -> None:
    """Runs everything and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    folder: Path = args.model or _default_model()
    llm = LLM(folder, memory="1GiB", prefix_caching=False, progress=True, threads=args.threads)
    bandwidth = read_bandwidth()
    floor_ms = llm.info.weight_bytes / bandwidth * 1e3
    ours, theirs = _ours(llm), _transformers(folder)
    rng = random.Random(0)
    table = Table("", "sequences", "convserve", "transformers", "floor")
    for count in track(SEQUENCES, description="Measuring", console=Console(stderr=True)):
        prompts = [
            [rng.randrange(3, llm.info.vocab_size) for _ in range(PROMPT_TOKENS)]
            for _ in range(count)
        ]
        mine, other = _interleaved(ours, theirs, prompts)
        table.add_row("prefill tok/s", str(count), f"{mine[0]:,.0f}", f"{other[0]:,.0f}", "")
        table.add_row(
            "decode tok/s",
            str(count),
            f"{mine[1]:,.1f}",
            f"{other[1]:,.1f}",
            f"{count / floor_ms * 1e3:,.0f}",
        )
        table.add_row(
            "decode ms/step",
            str(count),
            f"{count / mine[1] * 1e3:.2f}",
            f"{count / other[1] * 1e3:.2f}",
            f"{floor_ms:.2f}",
        )
    console = Console()
    console.print(
        f"{folder.name}, {llm.info.dtype}, {llm.info.weight_bytes / 1e6:,.0f} MB of weights, "
        f"{llm.info.device}, {processor()}, torch {torch.__version__}, {date.today()}\n"
        f"memory reads at {bandwidth / 1e9:.1f} GB/s; prompts of {PROMPT_TOKENS} tokens, "
        f"{OUTPUT_TOKENS} generated, median of {RUNS} runs"
    )
    console.print(table)


def read_bandwidth() -> float:
    """Bytes per second at which memory is read, the best of several sums over 512 MB."""
    data = torch.ones(2**27)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return best


def processor() -> str:
    """The processor's name and the instructions that matter here."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    flags = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f" {flag}" in text]
    return f"{names[0] if names else platform.processor()} ({', '.join(flags[:1])})"


def _interleaved(
    ours: Callable[[Prompts, int], object],
    theirs: Callable[[Prompts, int], object],
    prompts: Prompts,
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(prefill, decode) tokens per second of both, run in turn."""
    runs: tuple[list[tuple[float, float]], ...] = ([], [])
    for repeat in range(RUNS + 1):
        for generate, results in zip((ours, theirs), runs, strict=True):
            first = _seconds(generate, prompts, 1)
            both = _seconds(generate, prompts, 1 + OUTPUT_TOKENS)
            if repeat:  # the first is a warm-up
                prefill = len(prompts) * PROMPT_TOKENS / first
                results.append((prefill, len(prompts) * OUTPUT_TOKENS / (both - first)))
    mine, other = (
        (statistics.median(r[0] for r in results), statistics.median(r[1] for r in results))
        for results in runs
    )
    return mine, other


def _seconds(generate: Callable[[Prompts, int], object], prompts: Prompts, tokens: int) -> float:
    started = time.perf_counter()
    generate(prompts, tokens)
    return time.perf_counter() - started


def _ours(llm: LLM) -> Callable[[Prompts, int], object]:
    def generate(prompts: Prompts, tokens: int) -> object:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return llm.generate(prompts, params)

    return generate


def _transformers(folder: Path) -> Callable[[Prompts, int], object]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def generate(prompts: Prompts, tokens: int) -> object:
        ids = torch.tensor(prompts)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )

    return generate


def _default_model() -> Path:
    from convserve.server.default_model import default_model_folder

    return default_model_folder()


if __name__ == "__main__":
    sys.exit(main())
