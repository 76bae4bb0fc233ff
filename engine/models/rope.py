"""Rotary position embedding: the frequencies of each scaling kind, and the table of angles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import ModelError

KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn queries and keys."""

    theta: float
    rotary_dim: int
    """Leading channels of each head that are rotated."""
    kind: str = "default"
    params: dict[str, Any] = field(default_factory=dict)
    """The scaling kind's own parameters, under their Hugging Face names."""
    original_max_positions: int = 0


def parse_rope(raw: dict[str, Any], head_dim: int, max_positions: int) -> RopeConfig:
    """Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

    Raises:
        ModelError: a scaling kind that is not supported, or one of its parameters is missing.
    """
    params: dict[str, Any] = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = params.pop("rope_type", None) or params.pop("type", None) or "default"
    params.pop("type", None)
    if kind not in KINDS:
        raise ModelError(f"rope type {kind!r} is not supported (supported: {', '.join(KINDS)})")
    theta = params.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    partial = params.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1.0
    original = params.get("original_max_position_embeddings") or max_positions
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor",),
    }
    for key in needed.get(kind, ()):
        if not isinstance(params.get(key), (int, float)):
            raise ModelError(f"rope type {kind} needs a number {key!r}, got {params.get(key)!r}")
    return RopeConfig(float(theta), int(head_dim * partial), kind, params, int(original))


def rope_table(config: RopeConfig, length: int, device: torch.device) -> Tensor:
    """cos then sin of every position's angles. -> [length, rotary_dim] float32.

    Angles are computed in float64 and rounded once, so that long positions stay exact.
    """
    inverse, gain = _frequencies(config)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), inverse)
    table = torch.cat((angles.cos(), angles.sin()), dim=1) * gain
    return table.float().to(device)


def half_order(heads: int, head_dim: int, rotary_dim: int) -> Tensor:
    """Indices [heads * head_dim] that turn interleaved rotary channels into halves: of each head's
    first `rotary_dim` channels the even ones, then the odd ones, then the rest as it is."""
    rotary = torch.arange(rotary_dim).view(-1, 2).T.flatten()
    head = torch.cat((rotary, torch.arange(rotary_dim, head_dim)))
    return (torch.arange(heads)[:, None] * head_dim + head).flatten()


def _frequencies(config: RopeConfig) -> tuple[Tensor, float]:
    """(inverse frequencies [rotary_dim / 2] float64, factor on cos and sin)."""
    steps = torch.arange(0, config.rotary_dim, 2, dtype=torch.float64) / config.rotary_dim
    # Rounded to float32 as everybody's checkpoints were trained with.
    inverse = (1.0 / config.theta**steps).float().double()
    if config.kind == "default":
        return inverse, 1.0
    if config.kind == "linear":
        return inverse / config.params["factor"], 1.0
    if config.kind == "llama3":
        return _llama3(inverse, config), 1.0
    return _yarn(inverse, config)


def _llama3(inverse: Tensor, config: RopeConfig) -> Tensor:
    """Slow frequencies are stretched by `factor`, fast ones kept, those between blended."""
    low, high = config.params["low_freq_factor"], config.params["high_freq_factor"]
    turns = config.original_max_positions * inverse / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inverse * (kept + (1 - kept) / config.params["factor"])


def _yarn(inverse: Tensor, config: RopeConfig) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071): stretch channels that turn rarely, keep those that turn often."""
    p, dim = config.params, config.rotary_dim
    factor = p["factor"]

    def channel(turns: float) -> float:
        """The channel pair that makes this many turns over the original context."""
        period = config.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(period) / (2 * math.log(config.theta))

    low, high = channel(p.get("beta_fast") or 32), channel(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)
    stretched = ramp.clamp(0, 1)
    frequencies = inverse * (1 - stretched) + inverse / factor * stretched

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    gain = p.get("attention_factor")
    if gain is None:
        if p.get("mscale") and p.get("mscale_all_dim"):
            gain = magnitude(p["mscale"]) / magnitude(p["mscale_all_dim"])
        else:
            gain = magnitude(1.0)
    return frequencies, float(gain)
