"""Prefix caching side by side in one run: stored tails, replay alone, and off.

    python bench/prefix.py [MODEL FOLDER] [--sessions N] [--turns N]     or the default model
    python bench/prefix.py --random                                      the 1.42 B shape on a GPU

A multi-turn chat load: sessions with one shared system prompt and turns of their own, all running
at once. Printed for each: hit rate in tokens and what plain attention would have hit at the same
page size, tokens run again, memory of tails, time to first token of a long prompt cold, on the
first hit and on later ones. Then what the cache costs where nothing is ever shared: the same load
of prompts that are all different, with it and without it in turn.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _import  # noqa: F401  (makes `convserve` importable)
import torch
from convserve.engine.config import EngineConfig
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.resolve import resolve_device, resolve_dtype, resolve_limits
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from convserve.engine.models import Decoder

MODES: dict[str, dict[str, Any]] = {
    "tails": {},
    "replay": {"conv_tail_memory": "0"},
    "off": {"prefix_caching": False},
}
CONSOLE = Console(width=150)


@dataclass(frozen=True)
class Engine:
    """One engine and what a caller of it must know."""

    core: EngineCore
    vocab: int
    tails: str
    """Memory of its tails, in words."""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Greedy continuations of so many tokens, all prompts at once."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            self.core.add(GenerateRequest(request_id=str(i), prompt=tuple(prompt), params=params))
        made: list[list[int]] = [[] for _ in prompts]
        while self.core.has_work:
            for event in self.core.step():
                made[int(event.request_id)] += event.token_ids
        return made


def main() -> None:
    """Runs the load in every mode and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--random", action="store_true", help="random weights of the 1.42 B shape")
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system", type=int, default=256, help="tokens of the system prompt")
    parser.add_argument("--user", type=int, default=24, help="tokens of each user turn")
    parser.add_argument("--output", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--repeats", type=int, default=3, help="long prompts")
    parser.add_argument("--rounds", type=int, default=12, help="loads that share nothing")
    parser.add_argument("--memory", default="3GiB")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model, device = load(args)
    table = Table(
        "prefix caching",
        "hit rate",
        "of what attention hits",
        "replayed",
        "memory of tails",
        "load s",
        "TTFT cold ms",
        "first hit ms",
        "later hits ms",
    )
    engines: dict[str, Engine] = {}
    for mode in MODES:
        started = time.perf_counter()
        engine = engines[mode] = engine_of(model, device, args, mode)
        CONSOLE.print(f"{mode}: engine ready in {time.perf_counter() - started:.1f} s")
        times = first_token(engine, args.prefix, args.repeats)
        before = engine.core.stats()
        possible, seconds = conversations(engine, args)
        after = engine.core.stats()
        queries = after.prefix_queries - before.prefix_queries
        hits = after.prefix_hits - before.prefix_hits
        table.add_row(
            mode,
            f"{hits / queries:.1%}" if queries else "-",
            f"{hits / possible:.1%}",
            f"{after.replayed_tokens - before.replayed_tokens:,}",
            f"{engine.tails}, {after.tails_evicted - before.tails_evicted} evicted",
            f"{seconds:.1f}",
            *(f"{ms:.1f}" for ms in times),
        )
    CONSOLE.print(table)
    if args.rounds:
        CONSOLE.print(unshared(engines["tails"], engines["off"], args.rounds))


def load(args: argparse.Namespace) -> tuple[Decoder, torch.device]:
    """The model that every mode runs, and where."""
    config = EngineConfig(model=str(args.model), device=args.device)
    device = resolve_device(config)
    if args.random:
        from gpu_engine import random_model

        CONSOLE.print(f"random weights, 1.42 B shape, {torch.cuda.get_device_name()}")
        return random_model("q k v")[0], device
    from convserve.engine.models import load_model, read_config
    from convserve.server.default_model import DEFAULT_ADAPTER, default_model_folder

    adapter = DEFAULT_ADAPTER if args.model is None else None
    folder = args.model or default_model_folder()
    dtype = resolve_dtype(config, read_config(folder).dtype, device)
    return load_model(folder, dtype, device, conv_adapter=adapter), device


def engine_of(model: Decoder, device: torch.device, args: argparse.Namespace, mode: str) -> Engine:
    """An engine over the shared model, sized as `convserve serve` would size it."""
    config = EngineConfig(
        model="",
        memory=args.memory,
        max_num_seqs=max(args.sessions, 8),
        max_model_len=min(model.config.max_positions, args.prefix + 512),
        **MODES[mode],
    )
    spec = model.state_spec
    limits = resolve_limits(config, spec, model.config.max_positions, device)
    core = EngineCore(
        model,
        limits,
        (),
        device,
        prefix_caching=config.prefix_caching,
        overlap=device.type == "cuda",
    )
    tails = core.stats().tails_total * spec.tail_bytes / 2**20
    pages = limits.sizes.num_pages * limits.sizes.page_size * spec.kv_bytes_per_token / 2**20
    return Engine(core, model.config.vocab_size, f"{tails:,.1f} MiB beside {pages:,.0f} of KV")


def unshared(with_cache: Engine, without: Engine, rounds: int) -> str:
    """Throughput with the cache beside throughput without it, where no two prompts are alike."""
    rng = random.Random(1)
    ratios: list[float] = []
    for turn in range(rounds):
        seconds: list[float] = []
        pair = (with_cache, without) if turn % 2 else (without, with_cache)
        for engine in pair:
            prompts = [[rng.randrange(3, engine.vocab) for _ in range(128)] for _ in range(8)]
            started = time.perf_counter()
            engine.generate(prompts, 32)
            seconds.append(time.perf_counter() - started)
        on, off = seconds if turn % 2 else reversed(seconds)
        ratios.append(on / off)
    kept = sorted(ratios[2:] or ratios)  # the first rounds warm up
    return (
        f"nothing shared: time with the cache / without {statistics.median(kept):.3f} "
        f"[{kept[0]:.3f}, {kept[-1]:.3f}], median of {len(kept)} rounds of 8 x (128 + 32) tokens"
    )


def first_token(engine: Engine, length: int, repeats: int) -> tuple[float, float, float]:
    """Milliseconds to the first token after a long prompt: cold, and when all but its end is
    cached, the first time and later. Medians.
    """
    rng = random.Random(length)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, engine.vocab) for _ in range(count)]

    engine.generate([tokens(64)], 1)  # warm-up
    times: tuple[list[float], ...] = ([], [], [])
    for _ in range(repeats):
        prefix = tokens(length)
        for kind in (0, 1, 2, 2):
            prompt = prefix + tokens(16)
            started = time.perf_counter()
            engine.generate([prompt], 1)
            times[kind].append((time.perf_counter() - started) * 1e3)
    cold, first, later = (statistics.median(t) for t in times)
    return cold, first, later


def conversations(engine: Engine, args: argparse.Namespace) -> tuple[int, float]:
    """Plays every turn of every session; (tokens that attention alone could reuse, seconds)."""
    rng = random.Random(0)
    page = engine.core.limits.sizes.page_size
    system = [rng.randrange(3, engine.vocab) for _ in range(args.system)]
    histories = [list(system) for _ in range(args.sessions)]
    engine.generate([[*system, 5]], args.output)
    possible = 0
    started = time.perf_counter()
    for _ in range(args.turns):
        known = [len(h) for h in histories]
        for history in histories:
            history += [rng.randrange(3, engine.vocab) for _ in range(args.user)]
        # The last generated token of a turn was never computed.
        possible += sum((max(k - 1, args.system) // page) * page for k in known)
        for history, made in zip(histories, engine.generate(histories, args.output), strict=True):
            history += made
    return possible, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
