"""Writes a model folder of random weights: the 1.42 B shape of the GPU figures, or a smaller one.

    python bench/make_model.py OUT [--conv q k v] [--hidden 2048] [--layers 24] [--vocab 100352] ...

What such a model says is noise, but it costs what a trained one of its shape costs. Its tokenizer
has a token of several letters for every id, so streams carry text; prompts should be token ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import _import  # noqa: F401  (makes `convserve` importable)
import tokenizers
import torch
from convserve.engine.models.config import parse_config
from convserve.engine.models.conv_config import PLACES
from convserve.engine.models.decoder import Decoder
from convserve.kernels import Ops
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

META = torch.device("meta")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def main() -> None:
    """Reads the arguments."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--conv", nargs="*", choices=PLACES, default=["q", "k", "v"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--mlp", type=int, default=5504)
    parser.add_argument("--vocab", type=int, default=100352)
    args = parser.parse_args()
    config: dict[str, Any] = {
        "model_type": "dynconv" if args.conv else "llama",
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": args.mlp,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "eos_token_id": args.vocab - 1,
    }
    if args.conv:
        config["conv"] = {"kind": "lowrank", "width": 4, "rank": args.rank, "placement": args.conv}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    (args.out / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer(args.vocab).save(str(args.out / "tokenizer.json"))
    weights = random_weights(tensor_shapes(config))
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    print(f"{args.out}: {sum(w.numel() for w in weights.values()):,} weights")


class _Names:
    """Stands where a CheckpointReader does and notes what a model of this config asks for."""

    total_elements = 0

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return False

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        self.shapes[name] = shape
        return torch.empty(shape, dtype=dtype or torch.bfloat16, device=META)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of `config` has."""
    names = _Names()
    Decoder(Ops(), parse_config(config), names, torch.bfloat16, META)  # pyright: ignore[reportArgumentType]
    return names.shapes


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """bfloat16 weights scaled so that activations keep their size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            weights[name] = torch.ones(shape, dtype=torch.bfloat16)
            continue
        scale = 0.02 if "dynamic_conv" in name else shape[-1] ** -0.5
        drawn = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)
        weights[name] = drawn.mul_(scale).cpu()
    return weights


def tokenizer(size: int) -> tokenizers.Tokenizer:
    """A byte-level tokenizer whose ids above the bytes are made-up words with a space before."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for i in range(len(vocab), size):
        word, rest = "", i
        while rest:
            rest, letter = divmod(rest, 26)
            word += chr(ord("a") + letter)
        vocab[f"\u0120{word}"] = i
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return made


if __name__ == "__main__":
    main()
