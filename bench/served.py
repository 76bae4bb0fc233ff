"""Starts `convserve serve`, puts loads on it with `convserve loadtest`, prints one table.

    python bench/served.py [MODEL] [--streams 1 4 16] [--requests 32] [--idle 128 2048]
                           [--serve '--max-num-seqs 256'] [--out FOLDER]

Closed loops at each number of streams, then the time to the first token of single requests on an
idle server. Server and client share the machine. Prompts are random token ids, so nothing is found
in the prefix cache. `http` is the share of a core that the serving process took (Linux; the engine
is another process). With --out, the full report of each load is left there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _import  # noqa: F401  (makes `convserve` importable)
from convserve.loadtest.html import write_html
from convserve.loadtest.result import write_json
from convserve.loadtest.run import Settings, run
from convserve.loadtest.scenario import make_scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convserve.loadtest.result import Result

READY_SECONDS = 300
ROW = "{:17} {:>9} {:>25} {:>9} {:>9} {:>8} {:>8} {:>9} {:>5} {:>7}"
COLUMNS = ("load", "complete", "output tok/s [interval]", "TTFT p50", "TTFT p90", "ITL p50",
           "ITL p99", "E2E p50", "http", "client")  # fmt: skip


def main() -> int:
    """Runs every load; a load that fails is one line, the others go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=32, help="at least; 4 a stream")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--idle", type=int, nargs="*", default=[], help="prompt lengths")
    parser.add_argument("--vocab", type=int, help="draw prompt ids below this")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--serve", default="", help="flags of `convserve serve`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    shared = {"prompts": "ids", "vocab": args.vocab}
    loads: list[tuple[str, dict[str, Any]]] = []
    for streams in args.streams:
        load = {"concurrency": streams, "max_requests": max(args.requests, 4 * streams)}
        traffic = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
        loads.append((f"{streams} streams", {"load": load, "traffic": [traffic]}))
    for length in args.idle:
        load = {"concurrency": 1, "max_requests": 40}
        traffic = {"prompt_tokens": length, "output_tokens": 1}
        loads.append((f"idle, {length} tokens", {"load": load, "traffic": [traffic]}))
    failed = 0
    with served(args.model, shlex.split(args.serve)) as (url, process):
        print(ROW.format(*COLUMNS), "   (ms)", flush=True)
        for number, (name, table) in enumerate(loads):
            # a seed of its own: the prompts of the load before are in the cache
            table |= {"name": name, "request": shared, "seed": number}
            table["load"]["warmup"] = table["load"]["concurrency"]
            workers = min(args.workers, table["load"]["concurrency"])
            busy, began = cpu_seconds(process), time.perf_counter()
            try:
                result, _ = asyncio.run(
                    run(make_scenario(table), Settings(url=url, workers=workers))
                )
            except (RuntimeError, ValueError, OSError) as error:
                failed += 1
                print(f"{name:22} FAILED: {error}", flush=True)
                continue
            share = (cpu_seconds(process) - busy) / (time.perf_counter() - began)
            print(row(name, result, share), flush=True)
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                stem = re.sub(r"\W+", "-", name)
                write_json(result, args.out / f"{stem}.json")
                write_html(result, args.out / f"{stem}.html")
    return int(failed > 0)


def row(name: str, result: Result, busy: float) -> str:
    """One line of the table; the client's column says whether it was fast enough."""

    def ms(figure: str, quantile: str) -> str:
        found = result.full.latency.get(figure)
        value = found.percentiles[quantile].value if found else None
        return "-" if value is None else f"{value * 1e3:.2f}"

    rate = result.full.rates["output_token_rate"]
    spread = "" if rate.low is None else f" [{rate.low:,.0f} .. {rate.high:,.0f}]"
    figures = (("ttft", "p50"), ("ttft", "p90"), ("itl", "p50"), ("itl", "p99"), ("e2e", "p50"))
    line = ROW.format(
        name,
        f"{result.full.completed}/{result.full.requests}",
        f"{rate.value:,.1f}{spread}",
        *(ms(*figure) for figure in figures),
        f"{busy:.0%}",
        "ok" if result.audit.valid else "INVALID",
    )
    return "\n  ".join([line, *result.audit.reasons])


@contextlib.contextmanager
def served(model: str | None, flags: list[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A running server; yields its URL and its process."""
    command = [sys.executable, "-m", "convserve.server", "serve", *([model] if model else [])]
    command += ["--port", "0", "--no-access-log", *flags]
    print("$ convserve", *command[3:], flush=True)
    started = time.perf_counter()
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        with open(log.name, "w") as stderr:
            process = subprocess.Popen(command, stderr=stderr, env=_environment())
        try:
            while (found := re.search(r"http://127\S+", log.read())) is None:
                late = time.perf_counter() - started > READY_SECONDS
                if process.poll() is not None or late:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read()[-4000:]}")
                log.seek(0)
                time.sleep(0.1)
            print(f"ready after {time.perf_counter() - started:.1f} s", flush=True)
            yield found[0], process
            if process.poll() is not None:
                log.seek(0)
                print(f"the server is gone ({process.returncode}):\n{log.read()[-4000:]}")
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """CPU time of a process so far; 0 where /proc does not say."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment() -> dict[str, str]:
    """Child processes find `convserve` where this one did."""
    package = Path(sys.modules["convserve"].__path__[0]).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    return dict(os.environ)


if __name__ == "__main__":
    sys.exit(main())
