"""Speed of every kernel beside its peers and the byte floor, on one CUDA device.

    python bench/kernels.py [SECTION ...] [--tune] [--json FILE]

Each figure is microseconds a call: many calls over rotating operands (220 MB or more, so that
weights and state come from memory) chained in one CUDA graph; the median of its replays. `--tune`
measures every candidate launch shape, not only the one in kernels/tuning.py. Kernels are compiled
ahead by parallel processes, because a compile takes longer than a measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
import _import  # noqa: F401
import kernel_cases
import kernel_steps
import paged_peer
import torch
from captured import captured

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECTIONS = {**kernel_cases.SECTIONS, **kernel_steps.SECTIONS}
READ_CEILING = 3.108e6
"""Bytes a microsecond: what a plain read kernel reaches on the H100 (the byte floors' divisor)."""


@dataclass
class Case:
    """One table row: an op at one shape, its rivals, and the bytes it cannot avoid."""

    section: str
    name: str
    bytes: int
    make: Callable[[], dict[str, Callable[[], object]]]
    """Builds one set of operands -> {variant: call}."""
    set_bytes: int = 0
    """Bytes of one set, if more than `bytes`."""
    flops: int = 0
    results: dict[str, float] = field(default_factory=dict)


def time_calls(calls: list[Callable[[], object]], replays: int = 7) -> float:
    """Microseconds a call, chained in one graph."""
    graph = captured(calls)
    for _ in range(2):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    graph.reset()
    return median(times)


def measure(case: Case) -> None:
    """Times every variant of a case over enough operand sets to leave the cache."""
    size = max(case.bytes, case.set_bytes, 1)
    count = max(2, min(400, -(-220_000_000 // size)))
    sets = [case.make() for _ in range(count)]
    for name in sets[0]:
        calls = [s[name] for s in sets]
        while len(calls) < 8:
            calls = calls + calls
        try:
            case.results[name] = time_calls(calls)
        except Exception as error:
            case.results[name] = float("nan")
            torch.cuda.synchronize()
            sys.stdout.write(f"  {case.section} {case.name} {name}: {str(error)[:200]}\n")
    del sets
    torch.cuda.empty_cache()


def report(case: Case) -> str:
    """A line: the floor, the best variant of ours, and every figure."""
    floor = case.bytes / READ_CEILING
    parts = []
    for name, us in sorted(case.results.items(), key=lambda item: item[1]):
        rate = f"{case.flops / us / 1e6:.0f} TF/s" if case.flops else f"{case.bytes / us / 1e6:.2f}"
        parts.append(f"{name} {us:.2f} ({rate})")
    return f"{case.section:12s} {case.name:24s} floor {floor:8.2f} | " + " | ".join(parts)


def compile_ahead(argv: list[str], processes: int) -> None:
    """Fills Triton's disk cache: each process runs its share of the variants once."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *argv, "--share", f"{i}/{processes}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    for worker in workers:
        worker.wait()


def run_share(cases: Iterator[Case], share: str) -> None:
    """Runs every n-th variant once."""
    index, count = (int(part) for part in share.split("/"))
    at = 0
    for case in cases:
        variants = case.make()
        for call in variants.values():
            if at % count == index:
                try:
                    call()
                except Exception:
                    torch.cuda.synchronize()
            at += 1
        del variants
        torch.cuda.empty_cache()


def main() -> None:
    """Measures the sections asked for and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", default=[])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sections = options.sections or list(SECTIONS)

    def cases() -> Iterator[Case]:
        for section in sections:
            for case in SECTIONS[section](options.tune):
                yield Case(section, **case)

    if options.share:
        run_share(cases(), options.share)
        return
    argv = [*sections, *(["--tune"] if options.tune else [])]
    compile_ahead(argv, max(1, min(14, (os.cpu_count() or 2) - 2)))
    device = torch.cuda.get_device_name()
    sys.stdout.write(f"{device}, torch {torch.__version__}, us a call (TB/s or TFLOP/s)\n")
    if {"decode", "chunk"} & set(sections) and (why := paged_peer.missing()):
        sys.stdout.write(f"no row of torch's own paged attention: {why}\n")
    table = []
    for case in cases():
        measure(case)
        sys.stdout.write(report(case) + "\n")
        sys.stdout.flush()
        table.append({"section": case.section, "case": case.name, "bytes": case.bytes,
                      "flops": case.flops, "us": case.results})  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({"device": device, "rows": table}, indent=1))


if __name__ == "__main__":
    main()
