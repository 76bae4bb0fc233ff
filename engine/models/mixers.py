"""What stands in a layer beside its MLP: attention, a gated short convolution, or a recurrence.

Sizes alone, as a config gives them; how tensors become these layers is known to the builder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .conv_config import ConvConfig, parse_mixer_conv
from .errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Attention:
    """Softmax attention; heads are the model's."""

    window: int | None = None
    """Positions a token sees, itself included; None for all."""


@dataclass(frozen=True)
class ShortConv:
    """LFM2's block: a static convolution of b * x between two gates, over the hidden channels."""

    width: int
    bias: bool


@dataclass(frozen=True)
class GatedDelta:
    """The gated delta rule with its convolutions."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    eps: float
    layout: Literal["dynconv", "qwen3_next", "jet_nemotron"]
    """How the checkpoint stores projections and convolutions."""
    width: int = 0
    """Taps of the convolutions that the layout brings along; 0 for dynconv."""
    generator_hidden: int = 0
    """Jet-Nemotron: hidden width of the filter generator."""
    conv: ConvConfig | None = None
    """dynconv: convolutions of q, k, v."""

    @property
    def key_width(self) -> int:
        """Channels of q (or k)."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Channels of v."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2's selective state space with its convolution."""

    heads: int
    head_dim: int
    groups: int
    state_dim: int
    eps: float
    layout: Literal["dynconv", "mamba2"]
    width: int = 0
    """Taps of the built-in static convolution; 0 for dynconv."""
    bias: bool = False
    """Of the linear layers."""
    conv_bias: bool = False
    conv: ConvConfig | None = None
    """dynconv: the convolution of x, B, C."""

    @property
    def inner(self) -> int:
        """Channels of x, and of the gate."""
        return self.heads * self.head_dim

    @property
    def xbc_width(self) -> int:
        """Channels of x, B and C together: those that are convolved."""
        return self.inner + 2 * self.groups * self.state_dim


Mixer = Attention | ShortConv | GatedDelta | Mamba2


def parse_gated_delta(raw: Any) -> GatedDelta:
    """The `gated_delta_net` object of a dynconv config.

    Raises:
        ModelError: an unknown key, or a value that is missing or out of range.
    """
    sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    raw = _checked("gated_delta_net", raw, sizes)
    key_heads, value_heads, key_dim, value_dim = (
        positive(raw, key, within="gated_delta_net") for key in sizes
    )
    if value_heads % key_heads:
        raise ModelError(
            f"gated_delta_net.num_key_heads {key_heads} does not divide {value_heads} value heads"
        )
    conv = parse_mixer_conv(raw.get("conv"), "gated_delta_net", ("q", "k", "v"))
    eps = float(raw.get("norm_eps", 1e-6))
    return GatedDelta(key_heads, value_heads, key_dim, value_dim, eps, "dynconv", conv=conv)


def parse_mamba2(raw: Any) -> Mamba2:
    """The `mamba2` object of a dynconv config; raises as `parse_gated_delta`."""
    sizes = ("num_heads", "head_dim", "num_groups", "state_size")
    raw = _checked("mamba2", raw, sizes)
    heads, head_dim, groups, state_dim = (positive(raw, key, within="mamba2") for key in sizes)
    if heads % groups:
        raise ModelError(f"mamba2.num_groups {groups} does not divide {heads} heads")
    conv = parse_mixer_conv(raw.get("conv"), "mamba2", ("xbc",))
    if conv is None:
        raise ModelError("mamba2.conv is missing: x, B and C are always convolved")
    eps = float(raw.get("norm_eps", 1e-5))
    return Mamba2(heads, head_dim, groups, state_dim, eps, "dynconv", conv=conv)


def positive(raw: Mapping[str, Any], key: str, default: int | None = None, within: str = "") -> int:
    """A positive integer of a config object, called `within.key` in errors."""
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        name = f"{within}.{key}" if within else key
        raise ModelError(f"{name} must be a positive integer, got {raw.get(key)!r}")
    return value


def _checked(name: str, raw: Any, sizes: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ModelError(f"{name} must be an object, got {raw!r}")
    known = (*sizes, "norm_eps", "conv")
    for key in raw:
        if key not in known:
            raise ModelError(f"{name}.{key} is not a known key (known: {', '.join(known)})")
    return raw
