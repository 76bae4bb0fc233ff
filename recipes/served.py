"""Checks that the engine serves what was trained: the loss of both on the same windows.

    python recipes/served.py corpus/held-out.npy FOLDER... [--conv-adapter ADAPTER]

In float32 on the CPU by default, where the two should agree to rounding.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from conv_model import ConvModel, load
from convserve.engine import LLM
from convserve.engine.models.adapter import read_adapter
from loop import mean_loss, read_ids
from safetensors.torch import load_file


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--conv-adapter", type=Path)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    return parser


def load_with(folder: Path, adapter: Path | None) -> ConvModel:
    """The trainer's model of a folder, with an adapter's convolutions."""
    model = load(folder)
    if adapter is not None:
        described = read_adapter(adapter)
        conv = described.conv
        size = conv.get("rank") or conv.get("head_size") or 0
        model.add_sites(conv["kind"], conv["placement"], conv["width"], size)
        with torch.no_grad():
            kept = load_file(described.weights)
            for name, parameter in model.site_parameters().items():
                parameter.copy_(kept[name])
    return model


def compare(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Mean loss of the trainer's model and of the engine, nats per token."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    model = load_with(folder, args.conv_adapter).to(device)
    ids = read_ids(args.ids, device)
    trainer = mean_loss(model, ids, args.length, args.windows, dtype)
    tokens = np.load(args.ids).astype(int)
    starts = torch.linspace(0, len(tokens) - args.length - 1, args.windows).long().tolist()
    llm = LLM(
        folder,
        conv_adapter=args.conv_adapter,
        device=args.device,
        dtype=args.dtype,
        memory="512MiB",
        max_model_len=1024,
    )
    rows = llm.score([tokens[s : s + args.length + 1].tolist() for s in starts])
    engine = -float(np.mean([p for row in rows for p in row if p is not None]))
    return {"trainer": trainer, "engine": engine, "difference": engine - trainer}


def main(args: argparse.Namespace) -> None:
    """A line for each folder."""
    for folder in args.folders:
        print(json.dumps({"folder": str(folder), **compare(args, folder)}), flush=True)


if __name__ == "__main__":
    main(arguments().parse_args())
