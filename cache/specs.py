"""What a model asks of the cache, layer by layer, and what it costs: declared, not allocated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values of one attention layer."""

    kv_heads: int
    head_dim: int

    @property
    def elements_per_token(self) -> int:
        """Keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class ConvSpec:
    """The recent raw inputs of one convolution site."""

    channels: int
    """Convolved channels, all streams of the site side by side."""
    width: int
    """Taps W; the state is the last W - 1 inputs."""


@dataclass(frozen=True)
class LayerSpec:
    """Everything one layer carries from token to token."""

    attention: AttentionSpec | None = None
    convs: Mapping[str, ConvSpec] = field(default_factory=dict)
    """Conv sites by name (`qkv`, `o`, `gate_up`, `down`)."""


@dataclass(frozen=True)
class StateSpec:
    """The state of a whole model."""

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    replay_length: int | None
    """Tokens to run again before a position so that every conv window there is exact when keys and
    values are cached and windows are not; None if no number of tokens suffices (recurrent state).
    (W - 1) times the convolutions met in series along the residual path."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values per token, all layers."""
        elements = sum(s.attention.elements_per_token for s in self.layers if s.attention)
        return elements * self.dtype.itemsize

    @property
    def max_width(self) -> int:
        """The widest convolution of the model; 0 if it has none."""
        return max((c.width for s in self.layers for c in s.convs.values()), default=0)

    def ring_len(self, max_taken_back: int = 0) -> int:
        """Ring rows per slot so that `max_taken_back` tokens of a step can be undone.

        A power of two, at least the conv width; 1 for a model without convolutions.
        """
        needed = max(self.max_width, self.max_width - 1 + max_taken_back, 1)
        return 1 << (needed - 1).bit_length()

    def conv_bytes_per_sequence(self, ring_len: int) -> int:
        """Bytes of conv rings per slot, all sites of all layers."""
        return self._conv_channels * ring_len * self.dtype.itemsize

    @property
    def conv_tail_bytes(self) -> int:
        """Bytes of the conv windows at one position: W - 1 inputs of every site."""
        elements = sum(c.channels * (c.width - 1) for s in self.layers for c in s.convs.values())
        return elements * self.dtype.itemsize

    @property
    def _conv_channels(self) -> int:
        return sum(c.channels for s in self.layers for c in s.convs.values())


@dataclass(frozen=True)
class LayerState:
    """The tensors of one layer, handed to it with each batch."""

    k_pages: Tensor | None
    """[pages, kv heads, page_size, head_dim]"""
    v_pages: Tensor | None
    rings: Mapping[str, Tensor]
    """[slots, ring_len, channels] by site name."""
