"""Trains small models from scratch, one kind of convolution at a time, several seeds.

    python recipes/scratch.py OUT --train corpus/train.npy --tokenizer tokenizer.json \\
        --eval held-out=corpus/held-out.npy --kind lowrank --size 16 --seeds 0 1 2

Every kind sees the same batches of the same seed and starts from the same weights apart from its
filters. OUT/seed-N holds a folder that `convserve serve` loads, the curve and `result.json`.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from conv_model import KINDS, PLACES, ConvModel, save
from loop import (
    Plan,
    Windows,
    compile_parts,
    head_loss,
    head_of,
    mean_loss,
    read_ids,
    round_to,
    train,
    write_result,
)
from sites import HeadwiseConv, LowRankConv, StaticConv
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--eval", action="append", default=[], help="NAME=FILE.npy; repeat")
    parser.add_argument("--eval-windows", type=int, default=256)
    parser.add_argument("--kind", choices=KINDS, default="lowrank")
    parser.add_argument("--placement", nargs="+", choices=PLACES, default=["q", "k", "v"])
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--size", type=int, default=16, help="rank, or channels sharing a filter")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--inner", type=int, default=1024, help="width of the MLP, or of an expert")
    parser.add_argument("--experts", type=int, default=0, help="instead of one MLP")
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of even use of experts")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=0.0, help="stop each after this long")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser


def config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The config.json of a plain model of the given size."""
    raw = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.inner,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "head_dim": args.hidden // args.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if args.experts:
        raw |= {
            "model_type": "dynconv",
            "architectures": ["DynConvForCausalLM"],
            "num_experts": args.experts,
            "num_experts_per_tok": args.experts_per_token,
            "moe_intermediate_size": args.inner,
            "norm_topk_prob": True,
        }
    return raw


@torch.no_grad()
def start(model: ConvModel) -> None:
    """Residual branches small, and the paper's filters: zero where they depend on the input, random
    where they do not."""
    depth = len(model.model.layers)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.mul_((2 * depth) ** -0.5)
    for module in model.modules():
        if isinstance(module, StaticConv):
            taps, width = module.weight, module.weight.shape[-1]
        elif isinstance(module, LowRankConv):
            taps, width = module.proj_out_bias, module.width
        elif isinstance(module, HeadwiseConv):
            taps, width = module.static_w, module.width
        else:
            continue
        nn.init.uniform_(taps, -(width**-0.5), width**-0.5)


def fresh(args: argparse.Namespace, seed: int) -> ConvModel:
    """A model as the flags say, before training, on their device."""
    torch.manual_seed(seed)
    model = ConvModel(config_of(args))
    model.add_sites(args.kind, args.placement, args.width, args.size)
    start(model)
    model.to(torch.device(args.device))
    if args.compile:
        compile_parts(model)
    return model


def objective(model: ConvModel, windows: Windows, args: argparse.Namespace) -> Callable[[], Tensor]:
    """A function that draws a batch and returns its loss."""
    dtype = getattr(torch, args.dtype)
    cross_entropy = torch.compile(head_loss, dynamic=False) if args.compile else head_loss

    def loss_of() -> Tensor:
        tokens = windows.take(args.batch)
        loss = cross_entropy(model(tokens[:, :-1], dtype), head_of(model), tokens[:, 1:])
        return loss if model.unevenness is None else loss + args.balance * model.unevenness

    return loss_of


def main(args: argparse.Namespace) -> list[dict[str, float]]:
    """Trains every seed; returns their perplexities by evaluation set."""
    torch.set_float32_matmul_precision("high")
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ids = read_ids(args.train, device)
    sets = dict(item.split("=", 1) for item in args.eval)
    held = {name: read_ids(Path(path), device) for name, path in sets.items()}
    results = []
    for seed in args.seeds:
        model = fresh(args, seed)
        out = args.out / f"seed-{seed}"
        plan = Plan(
            steps=args.steps,
            batch=args.batch,
            length=args.length,
            lr=args.lr,
            warmup=max(args.steps // 10, 1),
            weight_decay=0.1,
            seed=seed,
            seconds=args.seconds,
        )
        windows = Windows(ids, args.length, seed)

        def perplexities(count: int, model: ConvModel = model) -> dict[str, float]:
            losses = {n: mean_loss(model, i, args.length, count, dtype) for n, i in held.items()}
            return {name: math.exp(loss) for name, loss in losses.items()}

        first = next(iter(held), None)

        def watch(model: ConvModel = model, first: str | None = first) -> float:
            return mean_loss(model, held[first or ""], args.length, 32, dtype)

        figures = train(
            model,
            list(model.parameters()),
            plan,
            objective(model, windows, args),
            [windows.generator],
            out,
            None if first is None else watch,
        )
        round_to(torch.bfloat16, model.parameters())
        save(model, out / "model")
        shutil.copy(args.tokenizer, out / "model" / "tokenizer.json")
        after = perplexities(args.eval_windows)
        size = sum(p.numel() for p in model.parameters())
        write_result(out, **figures, parameters=size, after=after, arguments=vars(args))
        results.append(after)
    return results


if __name__ == "__main__":
    main(arguments().parse_args())
