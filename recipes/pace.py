"""How long a training step of each kind of small model takes with the GPU to itself.

    python recipes/pace.py pace.json --seconds 60

Random tokens; compilation is left out; the file grows as kinds are timed, milliseconds by name.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from loop import Windows
from runs import MIXTURES, SCRATCH
from scratch import arguments as scratch_arguments
from scratch import fresh, objective


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


def main() -> None:
    """Every kind in turn, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--flags", default="", help="further flags of scratch.py")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    end = time.monotonic() + args.seconds
    found: dict[str, float] = {}
    first = ("none", "lowrank-all", "lowrank-qkv", "static-qkv", "headwise-qkv")
    kinds = {name: SCRATCH[name] for name in first} | MIXTURES
    for name, flags in kinds.items():
        if time.monotonic() < end:
            torch.compiler.reset()
            found[name] = round(milliseconds(f"{flags} {args.flags}", args.steps), 2)
            args.out.write_text(json.dumps(found, indent=1))
            print(name, found[name], flush=True)


if __name__ == "__main__":
    main()
