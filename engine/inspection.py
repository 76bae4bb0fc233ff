"""What a model folder holds and what serving it takes, without loading its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .config import EngineConfig
from .models import ModelConfig, state_spec
from .models.adapter import read_adapted
from .models.checkpoint import CheckpointReader
from .models.mixers import Attention, GatedDelta, Mixer, ShortConv
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

if TYPE_CHECKING:
    from ..cache import StateSpec


def inspect_model(folder: str | Path, config: EngineConfig | None = None) -> str:
    """A report in a few lines: layers, convolutions, parameters, bytes of state, what fits.

    Raises:
        ModelError: the folder is not a model that can be served.
    """
    folder = Path(folder)
    config = config or EngineConfig(model=str(folder))
    model, adapter = read_adapted(folder, config.conv_adapter)
    device = resolve_device(config)
    dtype = resolve_dtype(config, model.dtype, device)
    with CheckpointReader(folder, dtype, torch.device("cpu"), adapter=adapter) as reader:
        parameters = reader.total_elements
    spec = state_spec(model, dtype)
    ring_len = spec.ring_len()
    free = free_memory(device)
    weights = parameters * dtype.itemsize
    pool = parse_memory(config.memory, max(free - weights, 0), AUTO_SHARE[device.type])
    lines = [
        ("model", f"{folder} ({model.model_type})"),
        ("layers", f"{model.num_layers}, hidden {model.hidden_size}"),
        ("mixers", _mixers(model)),
        ("mlp", _mlp(model)),
        ("convolutions", describe_conv(model)),
        ("vocabulary", f"{model.vocab_size}{', tied' if model.tied_embeddings else ''}"),
        ("context", _context(model)),
        ("parameters", f"{parameters:,}, {mib(weights)} as {str(dtype).removeprefix('torch.')}"),
        ("KV per token", f"{spec.kv_bytes_per_token:,} bytes"),
        ("conv state per sequence", f"{spec.conv_bytes_per_sequence(ring_len):,} bytes"),
        ("recurrent per sequence", f"{spec.recurrent_bytes:,} bytes"),
        ("tail at a prefix", f"{spec.tail_bytes:,} bytes"),
        ("replay length", _replay(spec)),
        ("tails that fit", f"{resolve_tails(config, spec, pool):,}"),
        ("page pool", f"{mib(pool)} of {mib(free)} free on {device.type}"),
        ("sequences that fit", _fits(model, spec, pool, ring_len)),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _mixers(model: ModelConfig) -> str:
    """Every kind of mixer, in the order of first appearance, with how many layers have it."""
    counts = Counter(model.mixers)
    parts = [f"{count} {_mixer(model, mixer)}" for mixer, count in counts.items()]
    return "; ".join(parts)


def _mixer(model: ModelConfig, mixer: Mixer) -> str:
    if isinstance(mixer, Attention):
        text = f"attention, {model.num_heads} query and {model.num_kv_heads} kv heads of "
        text += str(model.head_dim)
        if mixer.window is not None:
            text += f", window {mixer.window}"
        if model.attention_gate:
            text += ", gated"
        return text if model.qk_norm == "none" else f"{text}, {model.qk_norm} QK-norm"
    if isinstance(mixer, ShortConv):
        return f"gated convolution, width {mixer.width}"
    if isinstance(mixer, GatedDelta):
        return (
            f"gated delta rule, {mixer.key_heads} key heads of {mixer.key_dim} and "
            f"{mixer.value_heads} value heads of {mixer.value_dim}"
        )
    return f"Mamba-2, {mixer.heads} heads of {mixer.head_dim}, state {mixer.state_dim}"


def _context(model: ModelConfig) -> str:
    rope = f", rope {model.rope.kind}" if model.has_attention else ""
    return f"{model.max_positions} tokens{rope}"


def _replay(spec: StateSpec) -> str:
    if spec.replay_length is None:
        return "none: a prefix is shared up to where a tail is stored"
    return f"{spec.replay_length} tokens"


def _mlp(model: ModelConfig) -> str:
    if not model.has_mlp:
        return "none"
    if model.experts is None:
        return f"SwiGLU {model.intermediate_size}"
    e = model.experts
    shared = f", one of {e.shared_width} shared" if e.shared_width else ""
    return f"{e.count} experts of {e.width}, {e.per_token} per token{shared}"


def _fits(model: ModelConfig, spec: StateSpec, pool: int, ring_len: int) -> str:
    parts: list[str] = []
    for length in (1024, model.max_positions):
        if length <= model.max_positions:
            held = min(length, spec.window or length)
            each = spec.kv_bytes_per_token * held + spec.slot_bytes(ring_len)
            parts.append(f"{pool // max(each, 1):,} of {length:,} tokens")
    return ", ".join(parts)
