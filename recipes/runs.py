"""What the study runs: names, flags, least seconds and order. Knows nothing of processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

EVERYWHERE = "--placement q k v o gate up down"
SCRATCH = {
    "none": "--kind none",
    "static-qkv": "--kind static",
    "headwise-qkv": "--kind headwise --size 16",
    "lowrank-qkv": "--kind lowrank --size 16",
    "lowrank-all": f"--kind lowrank --size 16 {EVERYWHERE}",
}
EXPERTS = "--experts 8 --inner 512"
MIXTURES = {
    "experts-none": f"--kind none {EXPERTS}",
    "experts-lowrank-qkv": f"--kind lowrank --size 16 {EXPERTS}",
}
PLACES = {f"lowrank-{p}": f"--kind lowrank --size 16 --placement {p}" for p in "qkv"}
FASTER = {f"{kind}-faster": flags for kind, flags in SCRATCH.items()}
LONGER = {kind: f"{kind}-as-long-as-all" for kind in SCRATCH}
WIDTHS = {f"lowrank-qkv-w{w}": f"--kind lowrank --size 16 --width {w}" for w in (1, 2, 3, 5, 6)}
RETROFIT = {
    "lora": ("--kind none --lora 32", ("1e-3", "2e-3", "4e-3", "8e-3")),
    "lowrank": ("--kind lowrank --size 15", ("2e-3", "4e-3", "8e-3")),
    "headwise": ("--kind headwise --size 32", ("5e-4", "1e-3", "2e-3")),
    "static": ("--kind static", ("5e-3", "1e-2")),
}
TOGETHER = {"lowrank-lora": "--kind lowrank --size 7 --lora 16"}
"""Convolutions and a weight update, of the size of either alone, at the rate of the former."""
RECALL_KINDS = ("lowrank-all", "none", "static", "headwise", "lowrank")
RECALL = {
    2: "--pairs 32 --length 160 --vocab 1024 --steps 800",
    1: "--pairs 16 --length 96 --vocab 512 --steps 1200",
}


@dataclass(frozen=True)
class Run:
    """One process."""

    name: str
    """Its folder."""
    script: str
    before: tuple[str, ...]
    """Arguments before the folder it writes to."""
    flags: str
    least: float
    """Seconds that must be left for it to be begun."""
    threads: int = 1
    rate: str = ""
    """Learning rate; empty: the script's own."""
    trials: tuple[str, ...] = ()
    """Runs of which the best one's rate is taken instead."""

    def words(self, folder: Path, rate: str) -> list[str]:
        """Arguments of the script."""
        out = [] if self.script == "served" else [str(folder)]
        return [*self.before, *out, *self.flags.split(), *(["--lr", rate] if rate else [])]


def scratch_runs(args: argparse.Namespace) -> list[Run]:
    """Small models, the comparison of kinds first."""
    small = f"--train {args.small_corpus}/train.npy --tokenizer {args.tokenizer}"
    small += f" --eval held-out={args.small_corpus}/held-out.npy"

    def run(name: str, flags: str, seed: int, steps: float = 1.0, rate: str = "") -> Run:
        flags = f"{small} --steps {round(args.scratch_steps * steps)} {flags} --seeds {seed}"
        rate = rate or args.scratch_rate
        return Run(f"scratch/{name}/{seed}", "scratch", (), flags, 30 * steps, 1, rate)

    first, *more = args.seeds
    kinds = {seed: [run(n, f, seed) for n, f in SCRATCH.items()] for seed in args.seeds}
    longer = dict(item.split("=", 1) for item in args.longer)
    mixtures = {seed: [run(n, f, seed) for n, f in MIXTURES.items()] for seed in args.seeds}
    return [
        *kinds[first],
        *(r for seed in more[:1] for r in kinds[seed]),
        *mixtures[first],
        *(run(n, f, first, rate="2e-3") for n, f in FASTER.items()),
        *(r for seed in more[1:] for r in kinds[seed]),
        *(run(n, f, first) for n, f in PLACES.items()),
        *(run(n, f, first) for n, f in WIDTHS.items()),
        *(run(LONGER[k], SCRATCH[k], first, float(times)) for k, times in longer.items()),
        *(r for seed in more for r in mixtures[seed]),
        *(run(n, f, seed) for seed in more for n, f in PLACES.items()),
        *(run(n, f, seed, rate="2e-3") for seed in more for n, f in FASTER.items()),
    ]


def recall_runs(args: argparse.Namespace) -> list[Run]:
    """Associative recall, on the CPU: one thread is faster than a GPU that others use."""
    return [
        Run(
            f"recall/{kind}-{layers}-{seed}",
            "recall",
            (),
            f"--kinds {kind} --layers {layers} --seeds {seed} {RECALL[layers]} --batch 32"
            " --device cpu --no-compile",
            60,
        )
        for layers in args.recall_layers
        for seed in args.seeds
        for kind in RECALL_KINDS
    ]


def retrofit_runs(args: argparse.Namespace) -> list[Run]:
    """For each kind: short trials of several rates, then whole runs at the best one."""
    data, own, base = args.corpus, args.own, (str(args.base),)
    common = f"--train {data}/train.npy --eval held-out={data}/held-out.npy"
    common += f" --anchor {own}/anchor.npy --anchor-weight 4"
    others = ("other-docs", "user-help", "essays", "quotations")
    whole = " ".join(f"--eval {name}={data}/{name}.npy" for name in others)
    whole = f"{common} {whole} --eval chats={own}/chats-held-out.npy --steps {args.retrofit_steps}"
    named = {kind: [f"retrofit/trial-{kind}-{rate}" for rate in rates]
             for kind, (_, rates) in RETROFIT.items()}  # fmt: skip
    trials = [
        Run(name, "retrofit", base, f"{common} --steps {args.trial_steps} {flags}", 80, 2, rate)
        for kind, (flags, rates) in RETROFIT.items()
        for name, rate in zip(named[kind], rates, strict=True)
    ]

    def run(name: str, flags: str, kind: str, seed: int) -> Run:
        flags, rates = f"{whole} {flags} --seed {seed}", tuple(named[kind])
        return Run(f"retrofit/{name}/{seed}", "retrofit", base, flags, 190, 2, trials=rates)

    first, *more = args.seeds
    wholes = [
        *(run(kind, flags, kind, first) for kind, (flags, _) in RETROFIT.items()),
        *(run(k, RETROFIT[k][0], k, seed) for seed in more for k in ("lora", "lowrank")),
        *(run(name, flags, "lowrank", first) for name, flags in TOGETHER.items()),
        *(run(k, RETROFIT[k][0], k, seed) for seed in more for k in ("headwise", "static")),
    ]
    return [*trials, *wholes]


def served_run(run: Run, args: argparse.Namespace) -> Run | None:
    """Scores by the engine what the first seed's run left, in float32 on the CPU."""
    if not run.name.endswith(f"/{args.seeds[0]}"):
        return None
    folder = args.work / run.name
    if run.script == "scratch":
        ids, model = args.small_corpus, f"{folder}/seed-{args.seeds[0]}/model"
    else:
        merged = "--lora" in run.flags
        ids, model = args.corpus, f"{folder}/model" if merged else f"{args.base}+{folder}"
    flags = "--windows 16 --length 256"
    return Run(run.name, "served", (f"{ids}/held-out.npy", model), flags, 15, 2)
