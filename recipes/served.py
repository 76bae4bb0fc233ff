"""Checks that the engine serves what was trained, and how fast: both losses on the same windows.

    python recipes/served.py corpus/held-out.npy FOLDER... BASE+ADAPTER... [--rounds 5]

In float32 on the CPU by default, where the two losses should agree to rounding. With --rounds the
engine generates from each model in turn and its tokens per second are compared with the first's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from conv_model import ConvModel, load
from convserve.engine import LLM, SamplingParams
from convserve.engine.models.adapter import read_adapter
from loop import mean_loss, read_ids
from safetensors.torch import load_file

PROMPT = 128


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", type=Path)
    parser.add_argument("models", nargs="+", help="FOLDER or BASE+ADAPTER")
    parser.add_argument("--windows", type=int, default=16, help="0: no losses")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=0, help="of speed")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16], help="sequences at once")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    return parser


def split(model: str) -> tuple[Path, Path | None]:
    """Folder and adapter."""
    folder, _, adapter = model.partition("+")
    return Path(folder), Path(adapter) if adapter else None


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


def engine(args: argparse.Namespace, model: str) -> LLM:
    """The engine with this model."""
    folder, adapter = split(model)
    return LLM(
        folder,
        conv_adapter=adapter,
        device=args.device,
        dtype=args.dtype,
        memory="256MiB",
        max_model_len=1024,
        max_num_seqs=max(args.streams),
        prefix_caching=False,
    )


def compare(args: argparse.Namespace, model: str) -> dict[str, float]:
    """Mean loss of the trainer's model and of the engine, nats per token."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    trained = load_with(*split(model)).to(device)
    ids = read_ids(args.ids, device)
    trainer = mean_loss(trained, ids, args.length, args.windows, dtype)
    tokens = np.load(args.ids).astype(int)
    starts = torch.linspace(0, len(tokens) - args.length - 1, args.windows).long().tolist()
    rows = engine(args, model).score([tokens[s : s + args.length + 1].tolist() for s in starts])
    served = -float(np.mean([p for row in rows for p in row if p is not None]))
    return {"trainer": trainer, "engine": served, "difference": served - trainer}


def speeds(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens per second of each model: its best round, and the median ratio to the first's."""
    llms = [engine(args, model) for model in args.models]
    tokens = np.load(args.ids).astype(int)
    cases = {f"decode, {n}": n for n in args.streams} | {"prefill, 1": 0}
    found = {name: [[] for _ in llms] for name in cases}
    for repeat in range(args.rounds + 1):
        for name, count in cases.items():
            starts = [repeat * 997 + i * 613 for i in range(max(count, 1))]
            prompts = [tokens[s : s + PROMPT].tolist() for s in starts]
            for llm, rates in zip(llms, found[name], strict=True):
                first = _seconds(llm, prompts, 1)
                rate = PROMPT / first
                if count:
                    more = _seconds(llm, prompts, 1 + args.new_tokens) - first
                    rate = count * args.new_tokens / max(more, 1e-9)
                if repeat:  # the first round warms up
                    rates.append(rate)
    return [
        {
            "model": model,
            **{name: round(max(rates[i]), 1) for name, rates in found.items()},
            **{
                f"{name}, of the first": round(
                    median(a / b for a, b in zip(rates[i], rates[0], strict=True)), 3
                )
                for name, rates in found.items()
            },
        }
        for i, model in enumerate(args.models)
    ]


def _seconds(llm: LLM, prompts: list[list[int]], tokens: int) -> float:
    begun = time.perf_counter()
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    return time.perf_counter() - begun


def main(args: argparse.Namespace) -> None:
    """A line for each model, then one of its speed."""
    if args.windows:
        for model in args.models:
            print(json.dumps({"model": model, **compare(args, model)}), flush=True)
    if args.rounds:
        for row in speeds(args):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(arguments().parse_args())
