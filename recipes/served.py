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


def engine(model: str, device: str, dtype: str, sequences: int) -> LLM:
    """The engine with this model, for so many sequences at once."""
    folder, adapter = split(model)
    return LLM(
        folder,
        conv_adapter=adapter,
        device=device,
        dtype=dtype,
        memory="256MiB" if device == "cpu" else "1GiB",
        max_model_len=1024,
        max_num_seqs=sequences,
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
    llm = engine(model, args.device, args.dtype, 16)
    rows = llm.score([tokens[s : s + args.length + 1].tolist() for s in starts])
    served = -float(np.mean([p for row in rows for p in row if p is not None]))
    return {"trainer": trainer, "engine": served, "difference": served - trainer}


def speeds(
    llms: dict[str, LLM], tokens: np.ndarray, streams: list[int], new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    """Tokens per second of engines in turn: best round, and the median ratio to the first engine's.

    Args:
        tokens: ids that prompts are cut from.
        streams: sequences at once, one case each.
    """
    cases = [f"{what}, {count}" for count in streams for what in ("prefill", "decode")]
    found: dict[str, dict[str, list[float]]] = {name: {c: [] for c in cases} for name in llms}
    for repeat in range(rounds + 1):
        for count in streams:
            starts = [(repeat * 997 + i * 613) % (len(tokens) - PROMPT) for i in range(count)]
            prompts = [tokens[s : s + PROMPT].tolist() for s in starts]
            for name, llm in llms.items():
                first = _seconds(llm, prompts, 1)
                more = max(_seconds(llm, prompts, 1 + new_tokens) - first, 1e-9)
                if repeat:  # the first round warms up
                    found[name][f"prefill, {count}"].append(count * PROMPT / first)
                    found[name][f"decode, {count}"].append(count * new_tokens / more)
    base = next(iter(found.values()))

    def ratio(rates: dict[str, list[float]], case: str) -> float:
        return round(median(a / b for a, b in zip(rates[case], base[case], strict=True)), 3)

    return [
        {
            "model": name,
            **{case: round(max(rates[case]), 1) for case in cases},
            **{f"{case}, of the first": ratio(rates, case) for case in cases},
        }
        for name, rates in found.items()
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
        llms = {m: engine(m, args.device, args.dtype, max(args.streams)) for m in args.models}
        tokens = np.load(args.ids).astype(int)
        for row in speeds(llms, tokens, args.streams, args.new_tokens, args.rounds):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(arguments().parse_args())
