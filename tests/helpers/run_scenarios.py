"""Every shipped scenario on the default model, scaled to a small machine; prints a table.

    python tests/helpers/run_scenarios.py [--out FOLDER] [--only chat rag]

Runs `convserve loadtest` as a user does and reads the JSON it leaves. The scales fit two cores:
less than the server can carry, but for `burst`, whose spike is meant to be more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from convserve.loadtest.result import Result, read_result
from convserve.server.default_model import default_model_folder
from running import serving

FLAGS = {
    "chat": ["--scale", "0.25:0.4"],
    "rag": ["--scale", "0.5:0.4"],
    "code": ["--scale", "0.5:0.4"],
    "burst": ["--scale", "0.6:0.5"],
    "soak": ["--scale", "0.5:0.0125", "--canary-every", "5"],
    "prefix": ["--scale", "1:0.3"],
}
COLUMNS = ("command", "requests", "failed", "output tok/s", "TTFT p50", "TTFT p90", "TPOT p50",
           "hit rate", "verdict")  # fmt: skip


def hit_rate(path: Path) -> float:
    """Share of prompt tokens that the server found in its prefix cache."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    asked = sum(row["prompt_tokens"] or 0 for row in rows)
    return sum(row["cached_tokens"] or 0 for row in rows) / max(asked, 1)


def row(command: str, result: Result, hits: float) -> str:
    """One line of the table; times in ms."""

    def ms(figure: str, percentile: str) -> str:
        found = result.full.latency.get(figure)
        value = found.percentiles[percentile].value if found else None
        return (
            "-" if value is None else f"{value * 1e3:,.1f}" if value < 1 else f"{value * 1e3:,.0f}"
        )

    verdict = "ok" if result.audit.valid else "INVALID: " + "; ".join(result.audit.reasons)
    if result.canary is not None and result.canary.sent:
        verdict += f", canary {result.canary.matched}/{result.canary.sent}"
    cells = (
        f"`{command}`",
        str(result.full.requests),
        str(sum(kind.count for kind in result.failures.values())),
        f"{result.full.rates['output_token_rate'].value:,.0f}",
        ms("ttft", "p50"), ms("ttft", "p90"), ms("tpot", "p50"),
        f"{hits:.0%}", verdict,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Reads the arguments; the exit code says whether every run was valid and free of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the reports stay")
    parser.add_argument("--only", nargs="+", choices=sorted(FLAGS), default=list(FLAGS))
    args = parser.parse_args()
    worst = 0
    with tempfile.TemporaryDirectory() as name:
        out = args.out or Path(name)
        out.mkdir(parents=True, exist_ok=True)
        folder = default_model_folder(progress=False)
        with serving(folder, Path(name) / "log", "--no-access-log", model="") as served:
            print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)  # noqa: T201
            for scenario in args.only:
                flags = ["-s", scenario, *FLAGS[scenario]]
                command = [sys.executable, "-m", "convserve.loadtest", served.url, *flags]
                done = subprocess.run(
                    [*command, "--out", str(out / scenario), "--quiet"],
                    stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                )  # fmt: skip
                worst = max(worst, done.returncode)
                if not (out / f"{scenario}.json").exists():
                    print(f"{scenario}: {done.stdout}{done.stderr}", flush=True)  # noqa: T201
                    continue
                result = read_result(out / f"{scenario}.json")
                hits = hit_rate(out / f"{scenario}.jsonl")
                print(row(" ".join(flags), result, hits), flush=True)  # noqa: T201
    return worst


if __name__ == "__main__":
    sys.exit(main())
