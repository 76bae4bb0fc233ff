"""Makes a dynamic-convolution model of a plain one, for timing: random filters near the identity.

    python bench/add_convolutions.py PLAIN_FOLDER OUT_FOLDER [--placement q k v] [--rank 16]

The text it writes is worth nothing; its shapes and costs are those of a trained model.
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
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plain", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--placement", nargs="+", choices=PLACES, default=["q", "k", "v"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    args = parser.parse_args()
    shutil.copytree(args.plain, args.out, dirs_exist_ok=True)
    config = json.loads((args.plain / "config.json").read_text())
    weights = load_file(args.plain / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in list(weights):
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        place = kind.removesuffix("_proj")
        if not kind.endswith("_proj") or place not in args.placement:
            continue
        rows, columns = weights[name].shape
        dtype = weights[name].dtype
        conv = f"{module}.dynamic_conv_{place}"
        code = torch.randn(args.rank, columns, generator=generator) * columns**-0.5
        up = torch.randn(args.rank, args.width * rows, generator=generator) * 0.02
        weights[f"{conv}.proj_in.weight"] = code.to(dtype)
        weights[f"{conv}.proj_out"] = up.to(dtype)
        weights[f"{conv}.proj_out_bias"] = torch.zeros(args.width, rows, dtype=dtype)
    config |= {
        "architectures": ["DynConvForCausalLM"],
        "model_type": "dynconv",
        "conv": {
            "kind": "lowrank",
            "width": args.width,
            "rank": args.rank,
            "placement": args.placement,
        },
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
