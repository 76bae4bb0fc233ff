"""How fast each kind trains and is served, with the device to itself.

    python recipes/pace.py pace.json --seconds 60
    python recipes/pace.py served.json --engines folders --shape BASE/config.json

Without `--engines`, milliseconds of a training step of each small kind, compilation left out. With
it, tokens per second of the engine for models of random weights: the small kinds, and those of a
retrofit of a shape, written under `folders` once. The file grows as they are timed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import retrofit
import torch
from conv_model import ConvModel, save
from loop import Windows
from runs import EVERYWHERE, MIXTURES, RETROFIT, SCRATCH
from scratch import arguments as scratch_arguments
from scratch import fresh, objective
from served import engine, speeds

if TYPE_CHECKING:
    from collections.abc import Iterator

TRAINED = ("none", "lowrank-all", "lowrank-qkv", "static-qkv", "headwise-qkv")


def milliseconds(flags: str, steps: int) -> float:
    """Of one step: loss, gradients, clipping, AdamW."""
    args = scratch_arguments().parse_args(f"- --train - --tokenizer - {flags}".split())
    model = fresh(args, 0)
    device = torch.device(args.device)
    ids = torch.randint(args.vocab, (1_000_000,), dtype=torch.int32, device=device)
    loss_of = objective(model, Windows(ids, args.length, 0), args)
    parameters = list(model.parameters())
    optimiser = torch.optim.AdamW(parameters, args.lr, weight_decay=0.1, fused=ids.is_cuda)
    begun = 0.0
    for step in range(5 + steps):
        if step == 5:  # compilation is behind
            float(torch.stack([p.detach().flatten()[0] for p in parameters]).sum())
            begun = time.perf_counter()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    float(torch.stack([p.detach().flatten()[0] for p in parameters]).sum())
    return 1e3 * (time.perf_counter() - begun) / steps


def random_models(shape: Path | None, flags: str) -> Iterator[tuple[str, str, ConvModel]]:
    """(group, name, model): the first of a group has no convolutions."""
    for group, kinds in (("small", SCRATCH), ("experts", MIXTURES)):
        for name, kind in kinds.items():
            words = f"- --train - --tokenizer - --device cpu --no-compile {flags} {kind}"
            yield group, name, fresh(scratch_arguments().parse_args(words.split()), 0)
    if shape is None:
        return
    raw = json.loads(shape.read_text())
    kinds = {"base": "--kind none"} | {n: kind for n, (kind, _) in RETROFIT.items() if n != "lora"}
    kinds["lowrank-all"] = f"{kinds['lowrank']} {EVERYWHERE}"
    for name, kind in kinds.items():
        args = retrofit.arguments().parse_args(f"- - --train - {kind}".split())
        model = ConvModel(raw)
        model.add_sites(args.kind, args.placement, args.width, args.size)
        yield "shape", name, model


def written(root: Path, shape: Path | None, flags: str) -> dict[str, dict[str, Path]]:
    """Folders of random models by group and name; those that are there are not made again."""
    index = root / "index.json"
    if not index.exists():
        names: dict[str, list[str]] = {}
        for group, name, model in random_models(shape, flags):
            save(model, root / group / name)
            names.setdefault(group, []).append(name)
        index.write_text(json.dumps(names))
    kept = json.loads(index.read_text())
    return {group: {n: root / group / n for n in names} for group, names in kept.items()}


def training(args: argparse.Namespace) -> None:
    """A step of every kind in turn, until the time is over."""
    end = time.monotonic() + args.seconds
    found: dict[str, float] = {}
    kinds = {n: SCRATCH[n] for n in TRAINED} | MIXTURES
    for name, kind in kinds.items():
        if name in (args.only or kinds) and time.monotonic() < end:
            torch.compiler.reset()
            flags = f"--device {args.device} {kind} {args.flags}"
            found[name] = round(milliseconds(flags, args.steps), 2)
            args.out.write_text(json.dumps(found, indent=1))
            print(name, found[name], flush=True)


def serving(args: argparse.Namespace) -> None:
    """All engines of a group in one process and in turn."""
    tokens = np.random.default_rng(0).integers(1, 64, 100_000)
    found: dict[str, list[dict[str, Any]]] = {}
    groups = written(args.engines, args.shape, args.flags)
    for group in args.only or groups:
        folders, most = groups[group].items(), max(args.streams)
        llms = {n: engine(str(p), args.device, "bfloat16", most) for n, p in folders}
        found[group] = speeds(llms, tokens, args.streams, args.new_tokens, args.rounds)
        args.out.write_text(json.dumps(found, indent=1))
        for row in found[group]:
            print(group, json.dumps(row), flush=True)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--flags", default="", help="further flags of scratch.py")
    parser.add_argument("--only", nargs="+", help="kinds, or groups of engines")
    parser.add_argument("--engines", type=Path, help="time the engine; where to write models")
    parser.add_argument("--shape", type=Path, help="config.json of the retrofits to serve")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    if args.engines is None:
        training(args)
    else:
        serving(args)


if __name__ == "__main__":
    main()
