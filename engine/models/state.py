"""The state that a model of a config carries, layer by layer; loads nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...cache.specs import AttentionSpec, ConvSpec, LayerSpec, RecurrentSpec, StateSpec
from .mixers import Attention, GatedDelta, Mamba2, ShortConv
from .replay import replay_length

if TYPE_CHECKING:
    import torch

    from .config import ModelConfig
    from .conv_config import ConvConfig

SITES = {
    "mixer_in": ("mixer_in",),
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "mlp_in": ("mlp_in",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
    "xbc": ("xbc",),
}
"""Conv sites by name, and what is convolved in each, side by side."""

ATTENTION_SITES = ("mixer_in", "qkv", "o")
MLP_SITES = ("mlp_in", "gate_up", "down")


def state_spec(config: ModelConfig, dtype: torch.dtype) -> StateSpec:
    """What the whole model asks of the cache."""
    layers = tuple(layer_spec(config, i) for i in range(config.num_layers))
    return StateSpec(layers, dtype, replay_length(config))


def layer_spec(config: ModelConfig, layer: int) -> LayerSpec:
    """What one layer asks of the cache."""
    c, mixer, conv = config, config.mixers[layer], config.conv_of(layer)
    widths = {
        "q": c.q_width,
        "k": c.kv_width,
        "v": c.kv_width,
        "gate": c.intermediate_size,
        "up": c.intermediate_size,
    }
    mlp = _sites(conv, MLP_SITES, widths, c.hidden_size)
    if isinstance(mixer, Attention):
        sites = _sites(conv, ATTENTION_SITES, widths, c.hidden_size)
        attention = AttentionSpec(c.num_kv_heads, c.head_dim, mixer.window)
        return LayerSpec(attention, sites | mlp)
    if isinstance(mixer, ShortConv):
        return LayerSpec(None, {"conv": ConvSpec(c.hidden_size, mixer.width)} | mlp)
    if isinstance(mixer, Mamba2):
        width = mixer.conv.width if mixer.conv else mixer.width
        recurrent = RecurrentSpec(mixer.heads, mixer.state_dim, mixer.head_dim)
        return LayerSpec(None, {"xbc": ConvSpec(mixer.xbc_width, width)} | mlp, recurrent)
    return LayerSpec(
        None,
        _delta_sites(mixer) | mlp,
        RecurrentSpec(mixer.value_heads, mixer.key_dim, mixer.value_dim),
    )


def _delta_sites(mixer: GatedDelta) -> dict[str, ConvSpec]:
    widths = {"q": mixer.key_width, "k": mixer.key_width, "v": mixer.value_width}
    if mixer.layout == "dynconv":
        return _sites(mixer.conv, ("qkv",), widths, 0)
    channels = mixer.value_width if mixer.layout == "jet_nemotron" else sum(widths.values())
    return {"qkv": ConvSpec(channels, mixer.width)}


def _sites(
    conv: ConvConfig | None, sites: tuple[str, ...], widths: dict[str, int], other: int
) -> dict[str, ConvSpec]:
    """The sites among `sites` where `conv` stands; places without a width have `other`."""
    found: dict[str, ConvSpec] = {}
    for site in sites:
        channels = sum(widths.get(p, other) for p in SITES[site] if conv and p in conv.placement)
        if conv is not None and channels:
            found[site] = ConvSpec(channels, conv.width)
    return found
