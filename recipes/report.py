"""Tables (Markdown, on stdout) and plots of a study.

    python recipes/report.py STUDY_FOLDER PLOTS_FOLDER

STUDY_FOLDER holds what `study.py` packed into figures.tar.gz, unpacked. If it holds `pace.json`,
milliseconds of a training step by kind with the GPU to itself, losses are set against time too.
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

from runs import FASTER, LONGER, MIXTURES, PLACES, RECALL_KINDS, RETROFIT, SCRATCH, TOGETHER, WIDTHS

Rows = list[dict[str, float]]


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("plots", type=Path)
    args = parser.parse_args()
    args.plots.mkdir(parents=True, exist_ok=True)
    if (args.study / "retrofit").is_dir():
        retrofits(args.study, args.plots)
    if (args.study / "scratch").is_dir():
        scratches(args.study, args.plots)
    if (args.study / "recall").is_dir():
        recalls(args.study, args.plots)


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


def retrofits(study: Path, plots: Path) -> None:
    """Perplexity of each set by kind, its change against the base, and the held-out curves."""
    trials = {}
    for path in sorted((study / "retrofit").glob("trial-*/result.json")):
        trials[path.parent.name] = json.loads(path.read_text())
    if trials:
        rows = [[n, f"{r['tokens'] / 1e6:.1f}M", f"{r['after']['held-out']:.3f}"]
                for n, r in trials.items()]  # fmt: skip
        table(["trial", "tokens", "held-out perplexity"], rows)
    folders = [p for p in (study / "retrofit").iterdir() if not p.name.startswith("trial-")]
    order = [*RETROFIT, *TOGETHER, *sorted(p.name for p in folders)]
    runs = {kind: results(study / "retrofit" / kind, "*/result.json") for kind in order}
    runs = {kind: found for kind, found in runs.items() if found}
    if not runs:
        return
    names = list(next(iter(runs.values()))[0]["after"])
    kept = study / "base.json"
    base = json.loads(kept.read_text()) if kept.exists() else {}
    rows = [["base", "", "", *(f"{base[n]:.3f}" if n in base else "" for n in names), ""]]
    for kind, found in runs.items():
        cells = []
        for name in names:
            values = [r["after"][name] for r in found]
            change = f", {mean(values) / base[name] - 1:+.1%}" if name in base else ""
            cells.append(spread(values, 3) + change)
        rate = found[0]["arguments"]["lr"]
        log = study / "retrofit" / kind / "0" / "served.log"
        rows.append([f"{kind} [{len(found)}]", f"{found[0]['trained'] / 1e6:.2f}M", f"{rate:g}",
                     *cells, served(log)])  # fmt: skip
    head = ["kind [seeds]", "trained", "rate", *names, "engine less trainer, nats"]
    table(head, rows)
    paths = {k: study / "retrofit" / k / "0" / "curve.csv" for k in order}
    curves = {k: read_rows(path) for k, path in paths.items() if path.exists()}
    plot_curves(curves, plots / "retrofit.png", "Retrofits of one base, first seed")


def scratches(study: Path, plots: Path) -> None:
    """Perplexity by kind, against tokens and against time; widths."""
    folder = study / "scratch"
    names = [*SCRATCH, *LONGER.values(), *MIXTURES, *FASTER, *PLACES, *WIDTHS]
    found = {name: results(folder / name, "*/*/result.json") for name in names}
    found = {name: runs for name, runs in found.items() if runs}
    kept = study / "pace.json"
    pace = json.loads(kept.read_text()) if kept.exists() else {}
    rows = []
    for name, runs in found.items():
        rows.append(
            [
                f"{name} [{len(runs)}]",
                f"{runs[0]['parameters'] / 1e6:.2f}M",
                f"{runs[0]['tokens'] / 1e6:.1f}M",
                spread([r["after"]["held-out"] for r in runs], 2),
                f"{pace[name]:.1f}" if name in pace else "",
                served(folder / name / "0" / "served.log"),
            ]
        )
    head = ["kind [seeds]", "parameters", "tokens", "held-out perplexity", "ms a step, alone"]
    table([*head, "engine less trainer, nats"], rows)
    curves = {
        name: read_rows(folder / name / "0" / "seed-0" / "curve.csv")
        for name in (*SCRATCH, *LONGER.values())
        if (folder / name / "0" / "seed-0" / "curve.csv").exists()
    }
    tokens = {n: c for n, c in curves.items() if n in (*SCRATCH, LONGER["none"])}
    plot_curves(tokens, plots / "from-scratch.png", "From scratch, first seed")
    if pace:
        timed = {n: c for n, c in curves.items() if n.removesuffix("-as-long-as-all") in pace}
        for name, run in timed.items():
            for row in run:
                row["time"] = row["step"] * pace[name.removesuffix("-as-long-as-all")] / 1e3
        plot_curves(timed, plots / "from-scratch-time.png", "The same against time", "time")
    plot_widths(found, plots / "widths.png")


def plot_widths(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Perplexity over the width of low-rank filters, if more than one was run."""
    names = {4: "lowrank-qkv", **{w: f"lowrank-qkv-w{w}" for w in (1, 2, 3, 5, 6)}}
    points = {w: found[n][0]["after"]["held-out"] for w, n in names.items() if n in found}
    if len(points) < 2 or "none" not in found:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.plot(sorted(points), [points[w] for w in sorted(points)], "o-", label="low-rank, q k v")
    axes.axhline(found["none"][0]["after"]["held-out"], color="grey", label="none")
    axes.set(xlabel="width W", ylabel="held-out perplexity")
    axes.legend()
    figure.savefig(path, dpi=130)


def plot_curves(curves: dict[str, Rows], path: Path, title: str, x: str = "tokens") -> None:
    """Held-out loss over tokens, or over seconds."""
    if not curves:
        return
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    scale, label = (1e6, "million tokens") if x == "tokens" else (1, "seconds of training, alone")
    for name, run in curves.items():
        held = [r for r in run if "held_out" in r]
        axes.plot([r[x] / scale for r in held], [r["held_out"] for r in held], "o-", markersize=3,
                  label=name)  # fmt: skip
    axes.set(xlabel=label, ylabel="held-out loss (nats per token)")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def recalls(study: Path, plots: Path) -> None:
    """Final accuracy by kind and depth, and accuracy over training."""
    runs: dict[tuple[str, int], dict[int, Rows]] = defaultdict(dict)
    for path in sorted((study / "recall").glob("**/recall.csv")):
        with path.open() as stream:
            for row in csv.DictReader(stream):
                key = row["kind"], int(row["layers"])
                point = {"step": float(row["step"]), "accuracy": float(row["accuracy"])}
                runs[key].setdefault(int(row["seed"]), []).append(point)
    rows = []
    for kind in RECALL_KINDS:
        cells = []
        for layers in (1, 2):
            whole = list(runs[kind, layers].values())
            reached = [next((f"{p['step']:.0f}" for p in r if p["accuracy"] >= 0.9), "never")
                       for r in whole]  # fmt: skip
            final = [100 * r[-1]["accuracy"] for r in whole]
            cells.append(f"{spread(final, 1)} [{len(final)}]" if final else "not run")
            cells.append(" ".join(reached))
        rows.append([kind, *cells])
    head = ["", "1 layer: % right [seeds]", "steps to 90%", "2 layers: % right", "steps to 90%"]
    table(head, rows)
    plt = pyplot()
    figure, both = plt.subplots(1, 2, figsize=(8.5, 3.6), layout="constrained", sharey=True)
    for layers, axes in zip((1, 2), both, strict=True):
        for color, kind in enumerate(RECALL_KINDS):
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
    both[0].legend(fontsize=8, loc="center right")
    figure.savefig(plots / "recall.png", dpi=130)


def results(folder: Path, pattern: str) -> list[dict[str, Any]]:
    """What the seeds of one kind wrote, in order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def served(log: Path) -> str:
    """The engine's loss less the trainer's."""
    lines = [x for x in log.read_text().splitlines() if x.startswith("{")] if log.exists() else []
    return f"{json.loads(lines[-1])['difference']:.0e}" if lines else ""


def read_rows(path: Path) -> Rows:
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
