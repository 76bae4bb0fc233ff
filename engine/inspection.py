"""What a model folder holds and what serving it takes, without loading its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from ..cache import AttentionSpec, ConvSpec, LayerSpec, StateSpec
from .config import EngineConfig
from .models import ModelConfig, read_config, replay_length
from .models.checkpoint import CheckpointReader
from .resolve import (
    AUTO_SHARE,
    free_memory,
    mib,
    parse_memory,
    resolve_device,
    resolve_dtype,
    resolve_tails,
)
from .start import describe_conv


def inspect_model(folder: str | Path, config: EngineConfig | None = None) -> str:
    """A report in a few lines: layers, convolutions, parameters, bytes of state, what fits.

    Raises:
        ModelError: the folder is not a model that can be served.
    """
    folder = Path(folder)
    config = config or EngineConfig(model=str(folder))
    model = read_config(folder)
    device = resolve_device(config)
    dtype = resolve_dtype(config, model.dtype, device)
    with CheckpointReader(folder, dtype, torch.device("cpu")) as reader:
        parameters = reader.total_elements
    spec = state_spec(model, dtype)
    ring_len = spec.ring_len()
    free = free_memory(device)
    weights = parameters * dtype.itemsize
    pool = parse_memory(config.memory, max(free - weights, 0), AUTO_SHARE[device.type])
    lines = [
        ("model", f"{folder} ({model.model_type})"),
        ("layers", f"{model.num_layers}, hidden {model.hidden_size}, {_attention(model)}"),
        ("mlp", _mlp(model)),
        ("convolutions", describe_conv(model)),
        ("vocabulary", f"{model.vocab_size}{', tied' if model.tied_embeddings else ''}"),
        ("context", f"{model.max_positions} tokens, rope {model.rope.kind}"),
        ("parameters", f"{parameters:,}, {mib(weights)} as {str(dtype).removeprefix('torch.')}"),
        ("KV per token", f"{spec.kv_bytes_per_token:,} bytes"),
        ("conv state per sequence", f"{spec.conv_bytes_per_sequence(ring_len):,} bytes"),
        ("conv tail at a prefix", f"{spec.conv_tail_bytes:,} bytes"),
        ("replay length", f"{spec.replay_length} tokens"),
        ("tails that fit", f"{resolve_tails(config, spec, pool):,}"),
        ("page pool", f"{mib(pool)} of {mib(free)} free on {device.type}"),
        ("sequences that fit", _fits(model, spec, pool, ring_len)),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def state_spec(model: ModelConfig, dtype: torch.dtype) -> StateSpec:
    """The state a model of this config will ask for, from the config alone."""
    widths = {
        "q": model.q_width,
        "k": model.kv_width,
        "v": model.kv_width,
        "o": model.hidden_size,
        "gate": model.intermediate_size,
        "up": model.intermediate_size,
        "down": model.hidden_size,
    }
    sites = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
    layers: list[LayerSpec] = []
    for i in range(model.num_layers):
        conv = model.conv_of(i)
        convs: dict[str, ConvSpec] = {}
        for site, places in sites.items():
            channels = sum(widths[p] for p in places if conv and p in conv.placement)
            if conv and channels:
                convs[site] = ConvSpec(channels, conv.width)
        layers.append(LayerSpec(AttentionSpec(model.num_kv_heads, model.head_dim), convs))
    return StateSpec(tuple(layers), dtype, replay_length(model))


def _attention(model: ModelConfig) -> str:
    text = f"{model.num_heads} query and {model.num_kv_heads} kv heads of {model.head_dim}"
    windows = {w for w in model.windows if w is not None}
    if windows:
        text += f", window {min(windows)} in {sum(w is not None for w in model.windows)} layers"
    return text if model.qk_norm == "none" else f"{text}, {model.qk_norm} QK-norm"


def _mlp(model: ModelConfig) -> str:
    if model.experts is None:
        return f"SwiGLU {model.intermediate_size}"
    e = model.experts
    return f"{e.count} experts of {e.width}, {e.per_token} per token"


def _fits(model: ModelConfig, spec: StateSpec, pool: int, ring_len: int) -> str:
    parts: list[str] = []
    for length in (1024, model.max_positions):
        if length <= model.max_positions:
            each = spec.kv_bytes_per_token * length + spec.conv_bytes_per_sequence(ring_len)
            parts.append(f"{pool // each:,} of {length:,} tokens")
    return ", ".join(parts)
