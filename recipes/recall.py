"""Multi-query associative recall (Arora et al., arXiv 2312.04927) with tiny models of every kind.

    python recipes/recall.py OUT --kinds none static lowrank --layers 1 2 --seeds 0 1 2

A sequence lists key-value pairs and then repeats the keys in random places; at each repeated key
the model must name its value. Writes the share of right answers over training to OUT/recall.csv.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import torch
from conv_model import PLACES, ConvModel
from loop import compile_parts, head_loss, head_of
from scratch import config_of, start
from torch import Tensor

KINDS = ("none", "static", "headwise", "lowrank", "lowrank-all")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--inner", type=int, default=128)
    parser.add_argument("--size", type=int, default=8, help="rank, or channels sharing a filter")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--length", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def make_batch(args: argparse.Namespace, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(tokens, targets) [batch, length] int64; a target is -1 where nothing is asked.

    Token 0 is filler; keys come from the lower half of the vocabulary, values from the upper.
    """
    batch, pairs, half, device = args.batch, args.pairs, args.vocab // 2, generator.device
    rank = torch.rand(batch, half - 1, generator=generator, device=device)
    keys = rank.topk(pairs).indices + 1
    values = torch.randint(half, args.vocab, (batch, pairs), generator=generator, device=device)
    tokens = torch.zeros(batch, args.length, dtype=torch.long, device=device)
    targets = torch.full_like(tokens, -1)
    tokens[:, : 2 * pairs] = torch.stack((keys, values), dim=2).flatten(1)
    rest = args.length - 2 * pairs
    order = torch.rand(batch, rest, generator=generator, device=device).topk(pairs).indices
    places = 2 * pairs + order
    tokens.scatter_(1, places, keys)
    targets.scatter_(1, places, values)
    return tokens, targets


def run(args: argparse.Namespace, kind: str, layers: int, seed: int) -> list[dict[str, Any]]:
    """Trains one model; rows of (step, accuracy)."""
    torch.manual_seed(seed)
    device = torch.device(args.device)
    size = argparse.Namespace(**{**vars(args), "layers": layers, "experts": 0})
    model = ConvModel(config_of(size))
    placement = list(PLACES) if kind == "lowrank-all" else ["q", "k", "v"]
    model.add_sites(kind.removesuffix("-all"), placement, 4, args.size)  # pyright: ignore
    start(model)
    model.to(device)
    cross_entropy = head_loss
    if args.compile:
        compile_parts(model)
        cross_entropy = torch.compile(head_loss, dynamic=False)
    generator = torch.Generator(device).manual_seed(seed)
    optimiser = torch.optim.AdamW(
        model.parameters(), args.lr, weight_decay=0.1, fused=device.type == "cuda"
    )
    rows: list[dict[str, Any]] = []
    begun = time.monotonic()
    for step in range(args.steps):
        rate = args.lr * min((step + 1) / 100, 1.0) * (1 - step / args.steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        tokens, targets = make_batch(args, generator)
        hidden = model(tokens, torch.float32)
        cross_entropy(hidden, head_of(model), targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if (step + 1) % max(args.steps // 20, 1) == 0:
            accuracy = measure(model, args, seed)
            rows.append(
                {
                    "kind": kind,
                    "layers": layers,
                    "seed": seed,
                    "step": step + 1,
                    "accuracy": accuracy,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "seconds": round(time.monotonic() - begun, 1),
                }
            )
    return rows


@torch.no_grad()
def measure(model: ConvModel, args: argparse.Namespace, seed: int) -> float:
    """Share of right answers on sequences that training does not see."""
    generator = torch.Generator(torch.device(args.device)).manual_seed(10_000 + seed)
    tokens, targets = make_batch(args, generator)
    asked = targets >= 0
    answers = model.logits(model(tokens, torch.float32)[asked]).argmax(-1)
    return float((answers == targets[asked]).float().mean())


def main(args: argparse.Namespace) -> None:
    """Every kind, depth and seed; the file grows as they end."""
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "recall.csv").open("w", newline="") as stream:
        writer: csv.DictWriter[str] | None = None
        for seed in args.seeds:
            for layers in args.layers:
                for kind in args.kinds:
                    rows = run(args, kind, layers, seed)
                    if writer is None:
                        writer = csv.DictWriter(stream, list(rows[0]))
                        writer.writeheader()
                    writer.writerows(rows)
                    stream.flush()
                    print(kind, layers, seed, rows[-1]["accuracy"], rows[-1]["seconds"], flush=True)


if __name__ == "__main__":
    main(arguments().parse_args())
