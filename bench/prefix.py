"""Prefix caching side by side in one run: stored tails, replay alone, and off.

    python bench/prefix.py [MODEL FOLDER] [--sessions N] [--turns N]     or the default model

A multi-turn chat load: sessions with one shared system prompt and turns of their own, all running
at once. Printed for each: hit rate in tokens and what plain attention would have hit at the same
page size, tokens run again, time to first token of a long prompt cold and on a hit. Then what the
cache costs where nothing is ever shared: the same load of prompts that are all different, with it
and without it in turn.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

from convserve.engine import LLM, SamplingParams
from convserve.server.default_model import DEFAULT_ADAPTER, default_model_folder
from rich.console import Console
from rich.progress import track
from rich.table import Table

MODES: dict[str, dict[str, object]] = {
    "tails": {},
    "replay": {"conv_tail_memory": "0"},
    "off": {"prefix_caching": False},
}


def main() -> None:
    """Runs the load in every mode and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--system", type=int, default=256, help="tokens of the system prompt")
    parser.add_argument("--user", type=int, default=24, help="tokens of each user turn")
    parser.add_argument("--output", type=int, default=24, help="tokens of each answer")
    parser.add_argument("--prefix", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    adapter = None
    if args.model is None:
        args.model, adapter = default_model_folder(), DEFAULT_ADAPTER
    args.conv_adapter = adapter
    table = Table(
        "prefix caching",
        "hit rate",
        "of what attention hits",
        "replayed",
        "tails",
        "load s",
        "TTFT cold ms",
        "TTFT hit ms",
    )
    for mode in track(MODES, description="Measuring", console=Console(stderr=True)):
        llm = LLM(
            args.model,
            conv_adapter=args.conv_adapter,
            memory=args.memory,
            device=args.device,
            max_num_seqs=max(args.sessions, 8),
            **MODES[mode],
        )
        cold, hit = first_token(llm, args.prefix)
        before = llm.stats
        possible, seconds = conversations(llm, args)
        after = llm.stats
        queries = after.prefix_queries - before.prefix_queries
        hits = after.prefix_hits - before.prefix_hits
        table.add_row(
            mode,
            f"{hits / queries:.1%}" if queries else "-",
            f"{hits / possible:.1%}",
            f"{after.replayed_tokens - before.replayed_tokens:,}",
            f"{after.tails_stored} of {after.tails_total}",
            f"{seconds:.1f}",
            f"{cold * 1e3:.1f}",
            f"{hit * 1e3:.1f}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(unshared(args))


def unshared(args: argparse.Namespace, rounds: int = 12) -> str:
    """Throughput with the cache beside throughput without it, where no two prompts are alike."""
    engines = [
        LLM(
            args.model,
            conv_adapter=args.conv_adapter,
            memory="1GiB",
            device=args.device,
            max_num_seqs=8,
            **MODES[mode],
        )
        for mode in ("tails", "off")
    ]
    vocab = engines[0].info.vocab_size
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    rng = random.Random(1)
    ratios: list[float] = []
    for turn in range(rounds):
        seconds: list[float] = []
        for llm in engines if turn % 2 else reversed(engines):
            prompts = [[rng.randrange(3, vocab) for _ in range(128)] for _ in range(8)]
            started = time.perf_counter()
            llm.generate(prompts, params)
            seconds.append(time.perf_counter() - started)
        on, off = seconds if turn % 2 else reversed(seconds)
        ratios.append(on / off)
    low, *_, high = sorted(ratios[2:])  # the first rounds warm up
    middle = statistics.median(ratios[2:])
    return (
        f"nothing shared: time with the cache / without {middle:.3f} [{low:.3f}, {high:.3f}], "
        f"median of {rounds - 2} rounds of 8 x (128 + 32) tokens"
    )


def first_token(llm: LLM, length: int) -> tuple[float, float]:
    """Seconds to the first token after a prompt, cold and when all but its end is cached."""
    rng = random.Random(length)
    prefix = [rng.randrange(3, llm.info.vocab_size) for _ in range(length)]
    params = SamplingParams(temperature=0, max_tokens=1)
    llm.generate([prefix[:64]], params)  # warm-up
    times: list[float] = []
    for _ in range(4):
        prompt = [*prefix, *(rng.randrange(3, llm.info.vocab_size) for _ in range(16))]
        started = time.perf_counter()
        llm.generate([prompt], params)
        times.append(time.perf_counter() - started)
    return times[0], min(times[2:])


def conversations(llm: LLM, args: argparse.Namespace) -> tuple[int, float]:
    """Plays every turn of every session; (tokens that attention alone could reuse, seconds)."""
    rng = random.Random(0)
    vocab, page = llm.info.vocab_size, llm.info.page_size
    system = [rng.randrange(3, vocab) for _ in range(args.system)]
    histories = [list(system) for _ in range(args.sessions)]
    params = SamplingParams(temperature=0, max_tokens=args.output, ignore_eos=True)
    llm.generate([[*system, 5]], params)
    possible = 0
    started = time.perf_counter()
    for _ in range(args.turns):
        known = [len(h) for h in histories]
        for history in histories:
            history += [rng.randrange(3, vocab) for _ in range(args.user)]
        # The last generated token of a turn was never computed.
        possible += sum((max(k - 1, args.system) // page) * page for k in known)
        for history, done in zip(histories, llm.generate(histories, params), strict=True):
            history += done.token_ids
    return possible, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
