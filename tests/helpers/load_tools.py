"""One closed loop of streamed completions, made by our load test, by GuideLLM and by AIPerf.

    python tests/helpers/load_tools.py [URL MODEL FOLDER] [--pin 0 1] [--streams 1 2] [--rounds 4]
    python tests/helpers/load_tools.py --mock --requests 48 --output-tokens 33

Each round runs ours twice and the other two once, in turn, beginning with another one each time.
The table gives the mean over rounds of every figure and, beside ours, the paired difference with
its 95 % interval over rounds; ours against itself says how much of that is noise. The lines below
say what the server saw in the same time, where it has vLLM's metrics: a tool that takes the
server's cores makes it slower, and measures that. --pin gives the server one core, with one
thread, and the tools another. Without a URL the default model is served; with --mock its tokens
are a mock server's, which takes 100 ms to the first and 15 ms to each other. FOLDER holds the
model's tokenizer. Definitions that differ are brought to ours: see docs/loadtest.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
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
from convserve.loadtest.run import Probe, Settings, probe, run
from convserve.loadtest.scenario import Scenario, make_scenario
from convserve.loadtest.scrape import parse_metrics
from convserve.loadtest.stats import student_t
from convserve.server.default_model import default_model_folder
from mocked import running_mock
from running import Served, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


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
    spread: int = 0
    """Standard deviation of the output lengths. With none, users who begin together end together,
    and half a millisecond decides for the whole run whether their prompts share a step."""
    seed: int = 0
    known: Probe | None = None
    """What our tool has asked already: its questions would count among the server's figures."""


class Measured(NamedTuple):
    """What a tool says of the complete requests; seconds."""

    ttft: list[float]
    tpot: list[float]
    """(end - first token) / (tokens - 1)."""
    e2e: list[float]
    output_tokens: list[int]


def ours(shape: Shape) -> Measured:
    """`convserve loadtest`, without its own judgement of the run."""
    scenario = our_scenario(shape)
    settings = Settings(url=shape.url, model=shape.model, scrape=False)
    _, records = asyncio.run(run(scenario, settings, known=shape.known))
    done = [record for record in records if record.completed]
    ttft, tpot, e2e = (
        [PER_REQUEST[name](record) or 0.0 for record in done] for name in ("ttft", "tpot", "e2e")
    )
    return Measured(ttft, tpot, e2e, [record.output_tokens or 0 for record in done])


def our_scenario(shape: Shape) -> Scenario:
    """The load as our tool is told of it."""
    return make_scenario(
        {
            "seed": shape.seed,
            "load": {"concurrency": shape.streams, "max_requests": shape.requests},
            "traffic": [
                {"prompt_tokens": shape.prompt_tokens, "output_tokens": _our_lengths(shape)}
            ],
        }
    )


def _our_lengths(shape: Shape) -> str:
    if not shape.spread:
        return str(shape.output_tokens)
    return f"lognormal:{shape.output_tokens}:{shape.spread / shape.output_tokens}"


class _GuideRequest(msgspec.Struct):
    time_to_first_token_ms: float
    inter_token_latency_ms: float
    request_latency: float
    output_tokens: int


def guidellm(program: str, shape: Shape, folder: Path) -> Measured:
    """GuideLLM, whose mean inter-token latency of a request is our `tpot`."""
    out = folder / "guidellm.json"
    lengths = f"output_tokens={shape.output_tokens}"
    if shape.spread:
        lengths += f",output_tokens_stdev={shape.spread}"
    extras = '{"body":{"ignore_eos":true}}'
    _run(
        [
            *(program, "run", "--disable-console"),
            *("--backend", f"kind=openai_http,target={shape.url},model={shape.model},"
              f"request_format=/v1/completions,extras={extras}"),
            *("--profile", f"kind=concurrent,streams={shape.streams}"),
            *("--constraint", f"kind=max_requests,count={shape.requests}"),
            *("--tokenizer", f"kind=huggingface_auto,model={shape.folder}"),
            *("--data", f"kind=synthetic_text,prompt_tokens={shape.prompt_tokens},{lengths}"),
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
            *("--osl-stddev", str(shape.spread)),
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


SERVER = {
    "TTFT ms": ("vllm:time_to_first_token_seconds_sum", "vllm:time_to_first_token_seconds_count"),
    "ITL ms": ("vllm:inter_token_latency_seconds_sum", "vllm:inter_token_latency_seconds_count"),
    "prompt": ("vllm:request_prompt_tokens_sum", "vllm:request_prompt_tokens_count"),
}
"""What it sums up, and over how many."""


def server_sums(url: str) -> dict[str, tuple[float, float]]:
    """(sum, count) of what the server has seen; zeros if it does not say."""
    try:
        with urlopen(f"{url}/metrics", timeout=10) as answer:
            values, _ = parse_metrics(answer.read().decode())
    except OSError:
        values = {}
    return {
        label: (values.get(total, 0.0), values.get(count, 0.0))
        for label, (total, count) in SERVER.items()
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


TOOLS = ("ours", "ours again", "GuideLLM", "AIPerf")


def compare(shape: Shape, rounds: int, clients: str) -> None:
    """Runs the tools in turn and prints the table."""
    programs = {name: shutil.which(name, path=clients) for name in ("guidellm", "aiperf")}
    if None in programs.values():
        sys.exit(f"guidellm or aiperf is not in {clients}: make test-clients installs them")
    settings = Settings(url=shape.url, model=shape.model)
    shape = shape._replace(known=asyncio.run(probe(settings, our_scenario(shape))))
    found: dict[str, list[Measured]] = {tool: [] for tool in TOOLS}
    seen: dict[str, dict[str, list[float]]] = {
        label: {tool: [] for tool in TOOLS} for label in SERVER
    }
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            for place in range(len(TOOLS)):
                tool = TOOLS[(number + place) % len(TOOLS)]
                # a seed of its own: the prompts of a load before may be in the server's cache
                asked = shape._replace(seed=shape.seed + number * len(TOOLS) + place)
                runs: dict[str, Callable[[], Measured]] = {
                    "ours": partial(ours, asked),
                    "ours again": partial(ours, asked),
                    "GuideLLM": partial(guidellm, str(programs["guidellm"]), asked, Path(name)),
                    "AIPerf": partial(aiperf, str(programs["aiperf"]), asked, Path(name)),
                }
                before = server_sums(shape.url)
                found[tool].append(runs[tool]())
                for label, (total, count) in server_sums(shape.url).items():
                    total, count = total - before[label][0], count - before[label][1]
                    scale = 1e3 if label.endswith("ms") else 1.0
                    seen[label][tool].append(total / count * scale if count else 0.0)
    print(f"{shape.streams} streams of {shape.requests} requests, {rounds} rounds")  # noqa: T201
    print(f"{'':16}" + "".join(f"{tool:>26}" for tool in TOOLS))  # noqa: T201
    for label, (figure, scale, digits) in FIGURES.items():
        values = {tool: [figure(m) * scale for m in made] for tool, made in found.items()}
        cells = [f"{statistics.fmean(values['ours']):26{digits}}"]
        for tool in TOOLS[1:]:
            gap, half = _paired(values[tool], values["ours"])
            mean = f"{statistics.fmean(values[tool]):{digits}}"
            cells.append(f"{f'{mean} ({gap:+{digits}} ± {half:{digits}})':>26}")
        print(f"{label:16}{''.join(cells)}")  # noqa: T201
    for label, by_tool in seen.items():
        told = "".join(f"{statistics.fmean(values):26.2f}" for values in by_tool.values())
        print(f"server {label:9}{told}", flush=True)  # noqa: T201


@contextlib.contextmanager
def default_model(core: int | None) -> Iterator[Served]:
    """The default model, whose cache remembers no prompt: every tool meets the same server."""
    flags = ["--no-access-log", "--no-prefix-caching", "--served-model-name", "default"]
    if core is not None:
        flags += ["--threads", "1"]
    with tempfile.TemporaryDirectory() as name:
        folder = default_model_folder(progress=False)
        with serving(folder, Path(name) / "log", *flags, model="", core=core) as served:
            yield served


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("server", nargs="*", metavar="URL MODEL FOLDER")
    parser.add_argument("--mock", action="store_true", help="put the load on a mock server")
    parser.add_argument("--pin", type=int, nargs=2, metavar=("SERVER", "TOOLS"), help="cores")
    parser.add_argument("--streams", type=int, nargs="+", default=[4])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument(
        "--spread", type=int, default=0, help="of output lengths, where streams > 1"
    )
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    if len(args.server) not in ((0,) if args.mock else (0, 3)):
        parser.error("URL MODEL FOLDER: give all three, or none for the default model or --mock")
    clients = os.environ.get("CONVSERVE_CLIENTS", ".venv/clients/bin")
    with contextlib.ExitStack() as stack:
        if args.server:
            url, model, folder = args.server
        elif args.mock:
            mock = stack.enter_context(running_mock())
            mock.program(ttft=(0.1,), itl=(0.015,))
            url, model, folder = mock.url, "mock", default_model_folder()
        else:
            url, model, folder = stack.enter_context(default_model(args.pin and args.pin[0]))
        if args.pin:
            os.sched_setaffinity(0, {args.pin[1]})
        for number, streams in enumerate(args.streams):
            shape = Shape(
                url, model, Path(folder), streams, args.requests,
                args.prompt_tokens, args.output_tokens, args.spread if streams > 1 else 0,
                seed=1000 * number,
            )  # fmt: skip
            compare(shape, args.rounds, clients)


if __name__ == "__main__":
    main()
