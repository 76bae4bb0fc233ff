"""Adds low-rank dynamic convolutions to a Llama-shaped model folder.

    python recipes/add_convolutions.py PLAIN_FOLDER OUT_FOLDER [--placement q k v] [--rank 15]

The new filters are the identity (proj_out and its bias zero, residual on), so the model computes
what it computed before: the starting point of a retrofit, whose training moves them. `--noise X`
makes the filters random around the identity instead, to time a model nobody has trained.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PLACES = ("q", "k", "v", "o", "gate", "up", "down")


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--placement", nargs="+", choices=PLACES, default=["q", "k", "v"])
    parser.add_argument("--rank", type=int, default=15)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--noise", type=float, default=0.0)
    args = parser.parse_args()
    add_convolutions(args.plain, args.out, args.placement, args.rank, args.width, args.noise)


def add_convolutions(
    plain: Path, out: Path, placement: list[str], rank: int, width: int, noise: float = 0.0
) -> None:
    """Writes the folder `out`: `plain` with convolutions after the named projections."""
    shutil.copytree(plain, out, dirs_exist_ok=True)
    config = json.loads((plain / "config.json").read_text())
    weights = load_file(plain / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in list(weights):
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        place = kind.removesuffix("_proj")
        if not kind.endswith("_proj") or place not in placement:
            continue
        rows, columns = weights[name].shape
        dtype = weights[name].dtype
        conv = f"{module}.dynamic_conv_{place}"
        code = torch.randn(rank, columns, generator=generator) * columns**-0.5
        up = torch.randn(rank, width * rows, generator=generator) * noise
        weights[f"{conv}.proj_in.weight"] = code.to(dtype)
        weights[f"{conv}.proj_out"] = up.to(dtype)
        weights[f"{conv}.proj_out_bias"] = torch.zeros(width, rows, dtype=dtype)
    config |= {
        "architectures": ["DynConvForCausalLM"],
        "model_type": "dynconv",
        "conv": {
            "kind": "lowrank",
            "width": width,
            "rank": rank,
            "placement": placement,
        },
    }
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
