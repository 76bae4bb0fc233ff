"""How far `convserve loadtest` is from the truth, which is the log of a mock server.

    chrt -f 10 python tests/helpers/load_truth.py [--awake] [--users 4]
                                                   [--requests 48] [--rounds 3]

The truth of a request is what the server saw: from its read of the request to its write of the
first chunk, from write to write, and from the read to the write of the last chunk. What a client
reports beyond that is its own lateness and the way through two sockets in each direction. Every
case runs several rounds; the table gives the median round of each figure, in ms.

A core that has slept for some milliseconds takes up to a fifth of one to wake up, which is in every
one of the four ways. `--awake` keeps a process of the lowest priority on each core, as a machine
booted with `idle=poll` would be; what is left is the client's and the sockets'.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from convserve.loadtest.figures import send_gap
from convserve.loadtest.run import Settings, run
from convserve.loadtest.scenario import make_scenario
from mocked import Mock, running_mock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from convserve.loadtest.result import Result

TOKENS = 12
FIGURES = (
    ("ttft", "p50"),
    ("ttft", "p90"),
    ("ttft_service", "p90"),
    ("itl", "p50"),
    ("itl", "p90"),
    ("e2e", "p50"),
)


class Case(NamedTuple):
    """Programmed delays, in s, cycled over requests and over gaps."""

    name: str
    ttft: tuple[float, ...]
    itl: tuple[float, ...]


CASES = (
    Case("5 ms", (0.005,), (0.005,)),
    Case("20 ms", (0.02,), (0.02,)),
    Case("100 ms", (0.1,), (0.1,)),
    Case("5, 5, 50 ms", (0.005, 0.005, 0.05), (0.005, 0.005, 0.02)),
)


def load_table(case: Case, closed: bool, requests: int, users: int) -> dict[str, Any]:
    """About as many requests at a time in either loop."""
    longest = max(case.ttft) + TOKENS * statistics.fmean(case.itl)
    load: dict[str, Any] = {"concurrency": users}
    if not closed:
        load = {"strategy": "constant", "rate": users / longest}
    return {
        "load": {**load, "max_requests": requests, "warmup": users},
        "traffic": [{"prompt_tokens": 32, "output_tokens": TOKENS}],
    }


def truth(log: list[dict[str, Any]], quantiles: dict[str, float]) -> dict[tuple[str, str], float]:
    """The same figures from the server's log, in s."""
    ttft = [entry["chunks"][0] - entry["arrived"] for entry in log]
    itl = np.concatenate([np.diff(entry["chunks"]) for entry in log])
    e2e = [entry["end"] - entry["arrived"] for entry in log]
    samples = {"ttft": ttft, "ttft_service": ttft, "itl": itl, "e2e": e2e}
    return {
        (figure, percentile): float(np.quantile(samples[figure], quantiles[percentile]))
        for figure, percentile in FIGURES
    }


def reported(result: Result) -> dict[tuple[str, str], float]:
    """What a reader of the report sees, in s; NaN for a percentile that it refuses."""
    return {
        (figure, name): result.full.latency[figure].percentiles[name].value or float("nan")
        for figure, name in FIGURES
    }


def measure(
    mock: Mock, case: Case, closed: bool, requests: int, users: int
) -> tuple[dict[tuple[str, str], tuple[float, float]], float, bool]:
    """({figure: (truth, reported)}, median send gap, whether the client was found fit); s."""
    mock.program(ttft=case.ttft, itl=case.itl)
    scenario = make_scenario(load_table(case, closed, requests, users))
    result, records = asyncio.run(run(scenario, Settings(url=mock.url, scrape=False)))
    # what was asked before the load, and its warm-up, came first
    log = [entry for entry in mock.log() if len(entry["chunks"]) == TOKENS][-requests:]
    known = truth(log, {"p50": 0.5, "p90": 0.9})
    told = reported(result)
    gap = statistics.median(send_gap(record) or 0.0 for record in records)
    return {key: (known[key], told[key]) for key in FIGURES}, gap, result.audit.valid


SPIN = """
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
os.sched_setaffinity(0, {int(sys.argv[1])})
while os.getppid() == int(sys.argv[2]):
    for _ in range(1_000_000):
        pass
"""


@contextlib.contextmanager
def kept_awake() -> Iterator[None]:
    """No core sleeps: where nobody else wants one, a process spins."""
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, "-c", SPIN]
    spinners = [subprocess.Popen([*command, str(core), str(os.getpid())]) for core in cores]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


def main() -> None:
    """Reads the arguments, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=4, help="at a time, or as many in rate")
    parser.add_argument("--awake", action="store_true", help="let no core sleep")
    args = parser.parse_args()
    print(f"{'delays':12} {'loop':6} " + "".join(f"{f} {p}".center(26) for f, p in FIGURES)  # noqa: T201
          + "send gap  client")  # fmt: skip
    awake = kept_awake() if args.awake else contextlib.nullcontext()
    with awake, running_mock() as mock:
        for case in CASES:
            for closed in (True, False):
                rounds = [
                    measure(mock, case, closed, args.requests, args.users)
                    for _ in range(args.rounds)
                ]
                cells = []
                for key in FIGURES:
                    told = statistics.median(figures[key][1] for figures, _, _ in rounds)
                    off = statistics.median(
                        figures[key][1] - figures[key][0] for figures, _, _ in rounds
                    )
                    cells.append(f"{told * 1e3:14.3f} ({off * 1e3:+.3f})  ")
                gap = statistics.median(gap for _, gap, _ in rounds)
                fit = all(valid for _, _, valid in rounds)
                print(  # noqa: T201
                    f"{case.name:12} {'closed' if closed else 'open':6} {''.join(cells)}"
                    f"{gap * 1e3:8.3f}  {'ok' if fit else 'INVALID'}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
