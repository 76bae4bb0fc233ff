"""Tables (Markdown, on stdout) and plots of a study.

    python recipes/report.py STUDY_FOLDER PLOTS_FOLDER

STUDY_FOLDER holds what `study.py` packed into figures.tar.gz and, if it was run, `recall.csv`.
Plots need matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

SCRATCH = ("none", "static-qkv", "headwise-qkv", "lowrank-qkv", "lowrank-all")
RECALL = ("none", "static", "headwise", "lowrank", "lowrank-all")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("plots", type=Path)
    args = parser.parse_args()
    args.plots.mkdir(parents=True, exist_ok=True)
    retrofits(args.study)
    scratches(args.study, args.plots)
    if (args.study / "recall.csv").exists():
        recalls(args.study, args.plots)
    if (args.study / "retrofit" / "final" / "curve.csv").exists():
        final_curve(args.study, args.plots)


def spread(values: list[float], digits: int) -> str:
    """Mean and range."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def retrofits(study: Path) -> None:
    """Perplexity of each set, and its change against the base."""
    results = {
        path.parent.name: json.loads(path.read_text())
        for path in sorted((study / "retrofit").glob("*/result.json"))
    }
    if not results:
        return
    before = next((r["before"] for r in results.values() if r["before"]), {})
    names = list(next(iter(results.values()))["after"])
    rows = [["base", "", "", *(f"{before[n]:.2f}" for n in names if n in before)]]
    for run, r in results.items():
        cells = []
        for name in names:
            change = f" ({r['after'][name] / before[name] - 1:+.1%})" if name in before else ""
            cells.append(f"{r['after'][name]:.2f}{change}")
        rows.append([run, f"{r['trained'] / 1e6:.2f}M", f"{r['tokens'] / 1e6:.2f}M", *cells])
    table(["", "trained", "tokens", *names], rows)


def scratches(study: Path, plots: Path) -> None:
    """Perplexity by kind, and the curves."""
    curves: dict[str, list[list[dict[str, float]]]] = {}
    rows = []
    for kind in SCRATCH:
        found = sorted((study / "scratch" / kind).glob("*/*/result.json"))
        if not found:
            continue
        results = [json.loads(path.read_text()) for path in found]
        curves[kind] = [read_rows(path.with_name("curve.csv")) for path in found]
        rows.append(
            [
                kind,
                f"{results[0]['parameters'] / 1e6:.2f}M",
                f"{results[0]['tokens'] / 1e6:.2f}M",
                spread([r["after"]["held-out"] for r in results], 2),
                str(len(results)),
                f"{max(r['tokens_per_second'] for r in results) / 1e3:.0f}k",
            ]
        )
    table(["", "parameters", "tokens", "held-out perplexity", "seeds", "training tok/s"], rows)
    if not curves:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for kind, runs in curves.items():
        held = [[r for r in run if "held_out" in r] for run in runs]
        axes.plot(
            [r["tokens"] / 1e6 for r in held[0]],
            [mean(run[i]["held_out"] for run in held) for i in range(len(held[0]))],
            "o-",
            markersize=3,
            label=kind,
        )
    axes.set(xlabel="million tokens", ylabel="held-out loss (nats per token)")
    axes.set_title("Small models from scratch, mean of seeds", fontsize=10)
    axes.legend()
    figure.savefig(plots / "from-scratch.png", dpi=130)


def recalls(study: Path, plots: Path) -> None:
    """Final accuracy by kind and depth, and accuracy over training."""
    runs: dict[tuple[str, int], dict[int, list[dict[str, float]]]] = defaultdict(dict)
    with (study / "recall.csv").open() as stream:
        for row in csv.DictReader(stream):
            key = row["kind"], int(row["layers"])
            point = {"step": float(row["step"]), "accuracy": float(row["accuracy"])}
            runs[key].setdefault(int(row["seed"]), []).append(point)
    last = max(p["step"] for seeds in runs.values() for run in seeds.values() for p in run)
    rows = []
    for kind in RECALL:
        cells = []
        for layers in (1, 2):
            whole = [r for r in runs[kind, layers].values() if r[-1]["step"] == last]
            reached = [
                next((p["step"] for p in r if p["accuracy"] >= 0.9), float("inf")) for r in whole
            ]
            final = [100 * r[-1]["accuracy"] for r in whole]
            cells.append(f"{spread(final, 1)} [{len(final)}]" if final else "not run")
            cells.append(" ".join("never" if s == float("inf") else f"{s:.0f}" for s in reached))
        rows.append([kind, *cells])
    head = ["", "1 layer: % right [seeds]", "steps to 90%", "2 layers: % right", "steps to 90%"]
    table(head, rows)
    plt = pyplot()
    figure, both = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained", sharey=True)
    for layers, axes in zip((1, 2), both, strict=True):
        for color, kind in enumerate(RECALL):
            for i, run in enumerate(runs[kind, layers].values()):
                axes.plot(
                    [p["step"] for p in run],
                    [100 * p["accuracy"] for p in run],
                    color=f"C{color}",
                    alpha=0.8,
                    label=kind if i == 0 else None,
                )
        axes.set(xlabel="step", title=f"{layers} layer{'s' if layers > 1 else ''}")
    both[0].set(ylabel="% of values recalled")
    both[1].legend(fontsize=8)
    figure.savefig(plots / "recall.png", dpi=130)


def final_curve(study: Path, plots: Path) -> None:
    """Loss of the retrofit that ships."""
    rows = read_rows(study / "retrofit" / "final" / "curve.csv")
    held = [r for r in rows if "held_out" in r]
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    axes.plot([r["tokens"] / 1e6 for r in rows], [r["loss"] for r in rows], label="training")
    axes.plot(
        [r["tokens"] / 1e6 for r in held], [r["held_out"] for r in held], "o-", label="held out"
    )
    axes.set(xlabel="million tokens", ylabel="nats per token")
    axes.legend()
    figure.savefig(plots / "retrofit.png", dpi=130)


def read_rows(path: Path) -> list[dict[str, float]]:
    """A curve's rows, empty cells left out."""
    with path.open() as stream:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(stream)]


def pyplot() -> Any:
    """matplotlib, drawing to files."""
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("agg")
    import matplotlib.pyplot  # pyright: ignore[reportMissingImports]

    return matplotlib.pyplot


if __name__ == "__main__":
    main()
