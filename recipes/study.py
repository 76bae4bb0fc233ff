"""The runs behind docs/model-quality.md, as processes that share one GPU for a fixed time.

    python recipes/study.py OUT --base FOLDER --corpus corpus --small-corpus corpus-4096 \\
        --tokenizer tokenizer-4096.json --own own-text --seconds 540

Chains of runs go side by side, so that the GPU works while others compile; a run that could not end
in time is not begun. After each, OUT is packed into at most eight files.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Run:
    """One process."""

    name: str
    script: str
    flags: str
    least: float
    """Seconds that must be left for it to be begun."""
    needs: Path | None = None
    """A file that another process may still be writing: waited for."""


def chains(args: argparse.Namespace) -> dict[str, list[Run]]:
    """Runs in order, by chain."""
    c, s, own = args.corpus, args.small_corpus, args.own
    others = ("other-docs", "user-help", "essays", "quotations")
    evals = " ".join(f"--eval {n}={c}/{n}.npy" for n in ("held-out", *others))
    evals += f" --eval chats={own}/chats-held-out.npy"
    free = f"--train {c}/train.npy {evals}"
    retrofit = f"{free} --anchor {own}/anchor.npy --anchor-weight 4"
    steps = f"--steps {args.retrofit_steps} --seconds 90"
    control = f"{retrofit} {steps}"
    retrofits = {
        "lowrank-free": f"{free} {steps}",
        "final": f"{retrofit} --steps {args.final_steps} --seconds 170 --before",
        "lowrank": control,
        "lora": f"{control} --kind lora --size 32 --lr 1e-3",
        "static": f"{control} --kind static --lr 5e-3",
        "headwise": f"{control} --kind headwise --size 32 --lr 1e-3",
        "lora-faster": f"{control} --kind lora --size 32 --lr 2e-3",
        "lowrank-faster": f"{control} --lr 4e-3",
    }
    small = f"--train {s}/train.npy --eval held-out={s}/held-out.npy --tokenizer {args.tokenizer}"
    small += f" --steps {args.scratch_steps}"
    everywhere = "--placement q k v o gate up down"
    kinds = {
        "none": "--kind none",
        "lowrank-qkv": "--kind lowrank --size 16",
        "lowrank-all": f"--kind lowrank --size 16 {everywhere}",
        "static-qkv": "--kind static",
        "headwise-qkv": "--kind headwise --size 16",
    }
    tiny = f"{small} --hidden 160 --layers 3 --heads 5 --inner 448 --kind lowrank --size 8"
    tiny += f" {everywhere} --steps {args.tiny_steps} --seconds 90"
    scratches = {
        f"{name}/{seed}": f"{small} {flags} --seeds {seed}"
        for seed in args.seeds
        for name, flags in kinds.items()
    }
    return {
        "retrofit": [
            Run(n, "retrofit", flags, 50, Path(own, "anchor.npy") if "--anchor" in flags else None)
            for n, flags in retrofits.items()
        ],
        "scratch": [
            *(Run(n, "scratch", flags, 40) for n, flags in list(scratches.items())[:5]),
            Run("tiny-all", "scratch", tiny, 40),
            *(Run(n, "scratch", flags, 40) for n, flags in list(scratches.items())[5:]),
        ],
    }


def main() -> None:
    """Runs the chains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--small-corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--own", type=Path, required=True, help="what sample.py wrote")
    parser.add_argument("--work", type=Path, default=Path("study"), help="where runs write")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--retrofit-steps", type=int, default=200)
    parser.add_argument("--final-steps", type=int, default=700)
    parser.add_argument("--scratch-steps", type=int, default=400)
    parser.add_argument("--tiny-steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    lock = threading.Lock()

    def follow(name: str, runs: list[Run]) -> None:
        for run in runs:
            while run.needs is not None and not run.needs.exists() and time.monotonic() < end:
                time.sleep(0.2)
            left = end - time.monotonic()
            if left < run.least:
                print(f"{run.name}: not begun, {left:.0f} s left", flush=True)
                continue
            folder = args.work / name / run.name
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, str(HERE / f"{run.script}.py")]
            command += [str(args.base)] if run.script == "retrofit" else []
            begun = time.monotonic()
            with (folder / "log").open("w") as log:
                try:
                    done = subprocess.run(
                        [*command, str(folder), *run.flags.split()],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        timeout=left,
                    )
                    code = str(done.returncode)
                except subprocess.TimeoutExpired:
                    code = "out of time"
            print(f"{run.name}: {code} after {time.monotonic() - begun:.0f} s", flush=True)
            with lock:
                pack(args.work, args.out)

    threads = [threading.Thread(target=follow, args=item) for item in chains(args).items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pack(work: Path, out: Path) -> None:
    """Figures of all runs in one archive, adapters in another, the smallest model in a third."""
    out.mkdir(parents=True, exist_ok=True)
    archives = {
        "figures": ("**/result.json", "**/curve.csv", "**/log"),
        "final": ("retrofit/final/adapter.*",),
        "controls": ("retrofit/lowrank/adapter.*", "retrofit/static/adapter.*"),
        "headwise": ("retrofit/headwise/adapter.*",),
        "tiny": ("scratch/tiny-all/seed-0/model/*",),
    }
    for name, patterns in archives.items():
        files = sorted({file for pattern in patterns for file in work.glob(pattern)})
        if files:
            partial = out / f"{name}.partial"
            with tarfile.open(partial, "w:gz") as archive:
                for file in files:
                    archive.add(file, file.relative_to(work))
            partial.rename(out / f"{name}.tar.gz")


if __name__ == "__main__":
    main()
