"""The runs behind docs/model-quality.md, side by side on one GPU for a fixed time.

    python recipes/study.py OUT --part scratch recall --small-corpus corpus-4096 \\
        --tokenizer tokenizer-4096.json --seconds 540
    python recipes/study.py OUT --part retrofit --base FOLDER --corpus corpus --own own-text

Runs wait in one queue for the GPU and one for the CPU, most wanted first; a run that could not end
in time is not begun, unless `--cut` says that it may go on another time. What has been trained is
scored again by the engine. After each run OUT is packed anew into a few archives, so that a stop at
any moment leaves what has been done; the same command then does the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from collections import deque
from pathlib import Path

from runs import Run, recall_runs, retrofit_runs, scratch_runs, served_run

HERE = Path(__file__).parent
ARCHIVES = {
    "figures": ("**/result.json", "**/curve.csv", "**/*.log", "**/recall.csv"),
    "adapters": ("retrofit/[!t]*/0/adapter.*",),
}


class Study:
    """Two queues, their workers and the clock."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.end = time.monotonic() + args.seconds
        self.gpu: deque[Run] = deque()
        self.cpu: deque[Run] = deque()
        for part in args.part:
            if part == "recall":
                self.cpu += recall_runs(args)
            else:
                self.gpu += scratch_runs(args) if part == "scratch" else retrofit_runs(args)
        self.again: deque[Run] = deque()
        """What has been trained, to be scored by the engine."""
        self.done = {run.name: threading.Event() for run in (*self.gpu, *self.cpu)}
        self.training = True
        self._lock = threading.Lock()

    def run(self) -> None:
        """Works until the queues are empty or the time is over."""
        trainers = [threading.Thread(target=self._train) for _ in range(self.args.gpu_workers)]
        others = [threading.Thread(target=self._recall) for _ in range(self.args.cpu_workers)]
        others += [threading.Thread(target=self._score) for _ in range(2)]
        for thread in (*trainers, *others):
            thread.start()
        for thread in trainers:
            thread.join()
        self.training = False
        for thread in others:
            thread.join()

    def _train(self) -> None:
        while (run := self._next(self.gpu)) is not None:
            done = self._is_done(run) or self._begin(run)
            again = served_run(run, self.args) if done else None
            if again is not None and not self._is_done(again):
                self.again.append(again)

    def _recall(self) -> None:
        while (run := self._next(self.cpu)) is not None:
            if not self._is_done(run):
                self._begin(run)

    def _score(self) -> None:
        while self.training or self.again:
            if (run := self._next(self.again)) is not None:
                self._begin(run)
            else:
                time.sleep(0.5)

    def _next(self, queue: deque[Run]) -> Run | None:
        with self._lock:
            return queue.popleft() if queue else None

    def _is_done(self, run: Run) -> bool:
        """Whether it ended well some time."""
        if found := self._mark_of(run).exists():
            self._mark(run)
        return found

    def _mark_of(self, run: Run) -> Path:
        return self.args.work / run.name / f"{run.script}.done"

    def _begin(self, run: Run) -> bool:
        """Runs it to its end; whether it was done."""
        rate = self.best_rate(run)
        left = self.end - time.monotonic()
        if left < (min(run.least, 40) if self.args.cut else run.least):
            self._tell(f"{run.name}: not begun, {left:.0f} s left")
            self._mark(run)
            return False
        folder = self.args.work / run.name
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(HERE / f"{run.script}.py"), *run.words(folder, rate)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(run.threads)}
        begun = time.monotonic()
        with (folder / f"{run.script}.log").open("w") as log:
            try:
                done = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=left, env=environment
                )
                code = str(done.returncode)
            except subprocess.TimeoutExpired:
                code = "out of time"
        at = f" at {rate}" if rate else ""
        took = time.monotonic() - begun
        self._tell(f"{run.name} {run.script}{at}: {code} after {took:.0f} s")
        if code == "0":
            self._mark_of(run).touch()
        self._mark(run)
        with self._lock:
            pack(self.args.work, self.args.out)
        return code == "0"

    def best_rate(self, run: Run) -> str:
        """The rate of the trials that left the lowest held-out perplexity; waits for them."""
        found: list[tuple[float, str]] = []
        for name in run.trials:
            while not self.done[name].wait(0.5) and time.monotonic() < self.end:
                pass
            result = self.args.work / name / "result.json"
            if result.exists():
                kept = json.loads(result.read_text())
                found.append((kept["after"]["held-out"], str(kept["arguments"]["lr"])))
        return min(found)[1] if found else run.rate

    def _mark(self, run: Run) -> None:
        if run.name in self.done:
            self.done[run.name].set()

    def _tell(self, line: str) -> None:
        left = self.end - time.monotonic()
        print(f"[{left:4.0f} s left] {line}", flush=True)


def pack(work: Path, out: Path) -> None:
    """Figures of all runs in one archive, small adapters in another."""
    out.mkdir(parents=True, exist_ok=True)
    for name, patterns in ARCHIVES.items():
        files = sorted({file for pattern in patterns for file in work.glob(pattern)})
        if files:
            partial = out / f"{name}.partial"
            with tarfile.open(partial, "w:gz") as archive:
                for file in files:
                    archive.add(file, file.relative_to(work))
            partial.rename(out / f"{name}.tar.gz")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--part", nargs="+", choices=("scratch", "recall", "retrofit"), required=True
    )
    parser.add_argument("--work", type=Path, default=Path("study"), help="where runs write")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--cut", action="store_true", help="begin runs that cannot end in time")
    parser.add_argument("--gpu-workers", type=int, default=4)
    parser.add_argument("--cpu-workers", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recall-layers", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--base", type=Path, default=Path("base"))
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--own", type=Path, default=Path("own"), help="what sample.py wrote")
    parser.add_argument("--retrofit-steps", type=int, default=700)
    parser.add_argument("--trial-steps", type=int, default=120)
    parser.add_argument("--small-corpus", type=Path, default=Path("corpus-4096"))
    parser.add_argument("--tokenizer", type=Path, default=Path("tokenizer-4096.json"))
    parser.add_argument("--scratch-steps", type=int, default=1000)
    parser.add_argument("--scratch-rate", default="1e-3")
    parser.add_argument(
        "--longer",
        nargs="*",
        default=["none=2.1"],
        help="KIND=FACTOR: so many times the steps take as long as the model convolved everywhere",
    )
    return parser


if __name__ == "__main__":
    Study(arguments().parse_args()).run()
