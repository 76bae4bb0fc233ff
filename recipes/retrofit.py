"""Adds convolutions to a model folder and trains them.

    python recipes/retrofit.py BASE OUT --train corpus/train.npy --eval held-out=corpus/held-out.npy

The filters start as the identity, so training starts at the base's own quality. By default the base
stays as it is, only the convolutions train, and OUT is an *adapter*: `convserve serve BASE
--conv-adapter OUT`. `--weights all` trains everything and writes a whole folder; so does `--whole`.
`--lora` trains a low-rank weight update too, or with `--kind none` alone: the control without
convolutions. It is merged and the whole folder written.

With `--anchor`, a share of each batch is text (such as the base's own, see sample.py) on which the
model is held to the base's predictions instead of to the text: what it should not forget.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from conv_model import KINDS, PLACES, ConvModel, load, save
from convserve.engine.models.adapter import write_adapter
from loop import (
    Plan,
    Windows,
    compile_parts,
    head_divergence,
    head_loss,
    head_of,
    mean_loss,
    read_ids,
    round_to,
    train,
    write_result,
)
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, required=True, help=".npy of token ids")
    parser.add_argument("--eval", action="append", default=[], help="NAME=FILE.npy; repeat")
    parser.add_argument("--eval-windows", type=int, default=96)
    parser.add_argument("--before", action="store_true", help="evaluate the base too")
    parser.add_argument("--anchor", type=Path, help=".npy of ids on which to stay like the base")
    parser.add_argument("--anchor-share", type=float, default=0.25, help="of each batch")
    parser.add_argument("--anchor-weight", type=float, default=1.0)
    parser.add_argument("--kind", choices=KINDS, default="lowrank")
    parser.add_argument("--placement", nargs="+", choices=PLACES, default=["q", "k", "v"])
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--size", type=int, default=15, help="rank, or channels sharing a filter")
    parser.add_argument("--lora", type=int, default=0, help="rank of a weight update")
    parser.add_argument("--weights", choices=("sites", "all"), default="sites")
    parser.add_argument("--whole", action="store_true", help="write a whole folder too")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main(args: argparse.Namespace) -> dict[str, float]:
    """Trains and writes; returns perplexities after, by name of the evaluation set."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = load(args.base)
    model.add_sites(args.kind, args.placement, args.width, args.size)
    if args.lora:
        model.add_lora(args.placement, args.lora)
    sites = model.site_parameters()
    if args.weights == "sites":
        for name, parameter in model.named_parameters():
            if name not in sites:
                parameter.requires_grad_(False)
                parameter.data = parameter.data.to(dtype)
    model.to(device)
    if args.compile:
        compile_parts(model)
    sets = dict(item.split("=", 1) for item in args.eval)
    held = {name: read_ids(Path(path), device) for name, path in sets.items()}

    def perplexities() -> dict[str, float]:
        losses = {n: mean_loss(model, i, 512, args.eval_windows, dtype) for n, i in held.items()}
        return {name: math.exp(loss) for name, loss in losses.items()}

    before = perplexities() if args.before else {}
    plan = Plan(
        steps=args.steps,
        batch=args.batch,
        length=args.length,
        lr=args.lr,
        warmup=min(30, max(args.steps // 10, 1)),
        seed=args.seed,
        seconds=args.seconds,
        save_every=200,
    )
    windows = Windows(read_ids(args.train, device), args.length, args.seed)
    anchors = None
    if args.anchor is not None:
        anchors = Windows(read_ids(args.anchor, device), args.length, args.seed + 1)
    loss_of = make_loss(model, windows, anchors, args, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise SystemExit("nothing to train: --kind none needs --lora or --weights all")
    first = next(iter(held), None)
    figures = train(
        model,
        trained,
        plan,
        loss_of,
        [w.generator for w in (windows, anchors) if w is not None],
        args.out,
        None if first is None else lambda: mean_loss(model, held[first], 512, 32, dtype),
    )
    size = sum(p.numel() for p in trained)
    round_to(torch.bfloat16, trained)
    model.merge_lora()
    after = perplexities()
    write(model, args)
    write_result(
        args.out, **figures, trained=size, before=before, after=after, arguments=vars(args)
    )
    return after


def make_loss(
    model: ConvModel,
    windows: Windows,
    anchors: Windows | None,
    args: argparse.Namespace,
    dtype: torch.dtype,
) -> Callable[[], Tensor]:
    """A function that draws a batch and returns its loss."""
    cross_entropy, divergence = head_loss, head_divergence
    if args.compile:
        cross_entropy = torch.compile(head_loss, dynamic=False)
        divergence = torch.compile(head_divergence, dynamic=False)
    held_like_base = round(args.batch * args.anchor_share) if anchors is not None else 0

    def loss_of() -> Tensor:
        tokens = windows.take(args.batch - held_like_base)
        if anchors is None:
            return cross_entropy(model(tokens[:, :-1], dtype), head_of(model), tokens[:, 1:])
        others = anchors.take(held_like_base)[:, :-1]
        with torch.no_grad():
            truth = model(others, dtype, sites=False)
        hidden = model(torch.cat((tokens[:, :-1], others)), dtype)
        new, like = hidden.split((len(tokens), held_like_base))
        loss = cross_entropy(new, head_of(model), tokens[:, 1:])
        return loss + args.anchor_weight * divergence(like, truth, head_of(model))

    return loss_of


def write(model: ConvModel, args: argparse.Namespace) -> None:
    """The adapter, or the whole folder with the base's tokenizer; a LoRA has been merged."""
    if args.weights == "sites" and not args.lora:
        sites = {name: p.detach() for name, p in model.site_parameters().items()}
        write_adapter(args.out, args.base, model.raw["conv"], sites)
        if not args.whole:
            return
    folder = args.out / "model"
    save(model, folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (args.base / name).exists():
            shutil.copy(args.base / name, folder)


if __name__ == "__main__":
    main(arguments().parse_args())
