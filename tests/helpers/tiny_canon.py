"""A random LlamaCanon checkpoint, under its stored names."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

EPS, HEADS, KV, DIM, HIDDEN, INNER, LAYERS, WIDTH = 1e-5, 4, 2, 8, 24, 20, 2, 4
CANON: dict[str, Any] = {
    "model_type": "LlamaCanon",
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "max_position_embeddings": 256,
    "rms_norm_eps": EPS,
    "rope_theta": 10000.0,
    "canon_set": "ABCD",
    "canon_kernel": WIDTH,
    "canon_residual": True,
    "canon_activation": False,
    "canon_bias": False,
    "qk_norm": True,
    "rope_dim": 4,
    "rope_version": "lingua",
    "tie_word_embeddings": False,
}
QKV = (HEADS + 2 * KV) * DIM


def write_canon(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Writes the folder; the tensors that it holds."""
    generator = torch.Generator().manual_seed(3)
    weights: dict[str, Tensor] = {}

    def rand(name: str, *shape: int, scale: float | None = None) -> None:
        size = shape[-1] ** -0.5 if scale is None else scale
        weights[f"{name}.weight"] = torch.randn(*shape, generator=generator) * size

    rand("model.embed_tokens", 64, HIDDEN, scale=1.0)
    rand("lm_head", 64, HIDDEN)
    rand("model.norm", HIDDEN, scale=1.0)
    canon = {"A": ("canonA", HIDDEN), "B": ("self_attn.canonB", QKV)}
    canon |= {"C": ("canonC", HIDDEN), "D": ("mlp.canonD", 2 * INNER)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            rand(f"{layer}.{norm}", HIDDEN, scale=1.0)
        for name, heads in (("q", HEADS), ("k", KV), ("v", KV)):
            rand(f"{layer}.self_attn.{name}_proj", heads * DIM, HIDDEN)
            if config["qk_norm"] and name != "v":
                rand(f"{layer}.self_attn.{name}_norm", heads * DIM, scale=1.0)
        rand(f"{layer}.self_attn.o_proj", HIDDEN, HEADS * DIM)
        for name in ("gate", "up"):
            rand(f"{layer}.mlp.{name}_proj", INNER, HIDDEN)
        rand(f"{layer}.mlp.down_proj", HIDDEN, INNER)
        for letter in config["canon_set"]:
            name, width = canon[letter]
            rand(f"{layer}.{name}", width, 1, WIDTH, scale=0.5)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights
