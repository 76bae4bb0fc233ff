"""One closed loop of streamed completions, made by our load test, by GuideLLM and by AIPerf.

    python tests/helpers/load_tools.py URL MODEL FOLDER [--streams 4] [--requests 64] [--rounds 4]

Each round runs the three in turn; the table gives the mean over rounds of every figure and, for the
other two, the paired difference from ours with its 95 % interval over rounds. Its last lines say
what the server saw in the same time, where it has vLLM's metrics: a tool that takes the server's
cores makes it slower, and measures that. FOLDER holds the model's tokenizer. Definitions that
differ are brought to ours: see docs/loadtest.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.request import urlopen

import msgspec
from convserve.loadtest.figures import PER_REQUEST
from convserve.loadtest.run import Settings, run
from convserve.loadtest.scenario import make_scenario
from convserve.loadtest.scrape import parse_metrics
from convserve.loadtest.stats import student_t

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Shape(NamedTuple):
    """The load: what is asked of which server, and how often."""

    url: str
    model: str
    folder: Path
    """With the model's tokenizer."""
    streams: int = 4
    requests: int = 16
    prompt_tokens: int = 128
    output_tokens: int = 64
    seed: int = 0


class Measured(NamedTuple):
    """What a tool says of the complete requests; seconds."""

    ttft: list[float]
    tpot: list[float]
    """(end - first token) / (tokens - 1)."""
    e2e: list[float]
    output_tokens: list[int]


def ours(shape: Shape) -> Measured:
    """`convserve loadtest`, without its own judgement of the run."""
    scenario = make_scenario(
        {
            "seed": shape.seed,
            "load": {"concurrency": shape.streams, "max_requests": shape.requests},
            "request": {"prompts": "text"},
            "traffic": [
                {"prompt_tokens": shape.prompt_tokens, "output_tokens": shape.output_tokens}
            ],
        }
    )
    _, records = asyncio.run(run(scenario, Settings(url=shape.url, model=shape.model)))
    done = [record for record in records if record.completed]
    ttft, tpot, e2e = (
        [PER_REQUEST[name](record) or 0.0 for record in done] for name in ("ttft", "tpot", "e2e")
    )
    return Measured(ttft, tpot, e2e, [record.output_tokens or 0 for record in done])


class _GuideRequest(msgspec.Struct):
    time_to_first_token_ms: float
    inter_token_latency_ms: float
    request_latency: float
    output_tokens: int


def guidellm(program: str, shape: Shape, folder: Path) -> Measured:
    """GuideLLM, whose mean inter-token latency of a request is our `tpot`."""
    out = folder / "guidellm.json"
    extras = '{"body":{"ignore_eos":true}}'
    _run(
        [
            *(program, "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={shape.url},model={shape.model},"
              f"request_format=/v1/completions,extras={extras}"),
            *("--profile", f"kind=concurrent,streams={shape.streams}"),
            *("--constraint", f"kind=max_requests,count={shape.requests}"),
            *("--tokenizer", f"kind=huggingface_auto,model={shape.folder}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={shape.prompt_tokens},"
              f"output_tokens={shape.output_tokens}"),
            *("--seed", f"kind=static,value={shape.seed}"),
            *("--output", f"kind=json,path={out}"),
        ],
        folder,
    )  # fmt: skip
    report = json.loads(out.read_text())
    rows = msgspec.convert(
        report["benchmarks"][0]["requests"]["successful"], list[_GuideRequest], strict=False
    )
    return Measured(
        [row.time_to_first_token_ms / 1e3 for row in rows],
        [row.inter_token_latency_ms / 1e3 for row in rows],
        [row.request_latency for row in rows],
        [row.output_tokens for row in rows],
    )


def aiperf(program: str, shape: Shape, folder: Path) -> Measured:
    """AIPerf, whose inter-token latency of a request is our `tpot`."""
    out = folder / "aiperf"
    _run(
        [
            *(program, "profile", "-m", shape.model, "--url", shape.url),
            *("--endpoint-type", "completions", "--streaming", "--use-server-token-count"),
            *("--tokenizer", str(shape.folder)),
            *("--concurrency", str(shape.streams), "--request-count", str(shape.requests)),
            *("--isl", str(shape.prompt_tokens), "--osl", str(shape.output_tokens)),
            *("--extra-inputs", "ignore_eos:true"),
            *("--random-seed", str(shape.seed), "--ui", "none"),
            *("--output-artifact-dir", str(out)),
        ],
        folder,
    )
    lines = (out / "profile_export.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = [row["metrics"] for row in rows if not row.get("error")]

    def seconds(name: str) -> list[float]:
        return [row[name]["value"] / 1e3 for row in found]

    tokens = [int(row["output_token_count"]["value"]) for row in found]
    return Measured(
        seconds("time_to_first_token"),
        seconds("inter_token_latency"),
        seconds("request_latency"),
        tokens,
    )


SERVER = {"TTFT": "vllm:time_to_first_token_seconds", "ITL": "vllm:inter_token_latency_seconds"}


def server_sums(url: str) -> dict[str, tuple[float, float]]:
    """(sum in s, count) of each latency that the server has seen; zeros if it does not say."""
    try:
        with urlopen(f"{url}/metrics", timeout=10) as answer:
            values, _ = parse_metrics(answer.read().decode())
    except OSError:
        values = {}
    return {
        label: (values.get(f"{name}_sum", 0.0), values.get(f"{name}_count", 0.0))
        for label, name in SERVER.items()
    }


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {done.stdout[-3000:]}{done.stderr[-3000:]}")


FIGURES: dict[str, tuple[Callable[[Measured], float], float, str]] = {
    "TTFT mean ms": (lambda m: statistics.fmean(m.ttft), 1e3, ".2f"),
    "TTFT p50 ms": (lambda m: statistics.median(m.ttft), 1e3, ".2f"),
    "TPOT mean ms": (lambda m: statistics.fmean(m.tpot), 1e3, ".3f"),
    "TPOT p50 ms": (lambda m: statistics.median(m.tpot), 1e3, ".3f"),
    "E2E mean ms": (lambda m: statistics.fmean(m.e2e), 1e3, ".1f"),
    "E2E p50 ms": (lambda m: statistics.median(m.e2e), 1e3, ".1f"),
    "output tokens": (lambda m: float(sum(m.output_tokens)), 1.0, ".0f"),
}


def _paired(values: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences round by round, and half its 95 % interval."""
    gaps = [value - other for value, other in zip(values, base, strict=True)]
    if len(gaps) < 2:
        return gaps[0], float("inf")
    half = student_t(len(gaps) - 1) * statistics.stdev(gaps) / len(gaps) ** 0.5
    return statistics.fmean(gaps), half


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    clients = os.environ.get("CONVSERVE_CLIENTS", ".venv/clients/bin")
    found: dict[str, list[Measured]] = {"ours": [], "GuideLLM": [], "AIPerf": []}
    programs = {name: shutil.which(name, path=clients) for name in ("guidellm", "aiperf")}
    if None in programs.values():
        sys.exit(f"guidellm or aiperf is not in {clients}: make test-clients installs them")
    seen: dict[str, dict[str, list[float]]] = {
        label: {tool: [] for tool in found} for label in SERVER
    }
    for number in range(args.rounds):
        shape = Shape(
            args.url, args.model, args.folder, args.streams, args.requests,
            args.prompt_tokens, args.output_tokens, seed=number,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as name:
            runs: dict[str, Callable[[], Measured]] = {
                "ours": partial(ours, shape),
                "GuideLLM": partial(guidellm, str(programs["guidellm"]), shape, Path(name)),
                "AIPerf": partial(aiperf, str(programs["aiperf"]), shape, Path(name)),
            }
            for tool, measure in runs.items():
                before = server_sums(args.url)
                found[tool].append(measure())
                for label, (total, count) in server_sums(args.url).items():
                    total, count = total - before[label][0], count - before[label][1]
                    seen[label][tool].append(total / count * 1e3 if count else 0.0)
        print(f"round {number + 1} of {args.rounds} done", flush=True)  # noqa: T201
    for label, (figure, scale, digits) in FIGURES.items():
        values = {tool: [figure(m) * scale for m in rounds] for tool, rounds in found.items()}
        cells = [f"{label:14} ours {statistics.fmean(values['ours']):9{digits}}"]
        for tool in ("GuideLLM", "AIPerf"):
            gap, half = _paired(values[tool], values["ours"])
            cells.append(
                f"{tool} {statistics.fmean(values[tool]):9{digits}} "
                f"({gap:+{digits}} ± {half:{digits}})"
            )
        print("   ".join(cells))  # noqa: T201
    for label, by_tool in seen.items():
        told = [f"{tool} {statistics.fmean(values):9.3f}" for tool, values in by_tool.items()]
        print(f"server {label:7} {'   '.join(told)}")  # noqa: T201


if __name__ == "__main__":
    main()
