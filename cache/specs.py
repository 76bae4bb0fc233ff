"""What a model asks of the cache, layer by layer, and what it costs: declared, not allocated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values of one attention layer."""

    kv_heads: int
    head_dim: int
    window: int | None = None
    """Positions that a token sees, itself included; None for all."""

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
class RecurrentSpec:
    """The state of a linear recurrence: one matrix per head, float32 whatever the model's dtype.

    It holds the whole past in a fixed size, so it cannot be taken back or rebuilt from a few
    tokens: only a stored copy of it makes a prefix usable.
    """

    heads: int
    key_dim: int
    value_dim: int

    @property
    def elements(self) -> int:
        """Numbers of one sequence."""
        return self.heads * self.key_dim * self.value_dim


@dataclass(frozen=True)
class LayerSpec:
    """Everything one layer carries from token to token."""

    attention: AttentionSpec | None = None
    convs: Mapping[str, ConvSpec] = field(default_factory=dict)
    """Conv sites by name (`qkv`, `o`, `gate_up`, `down`, ...)."""
    recurrent: RecurrentSpec | None = None


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
    def window(self) -> int | None:
        """Positions that a token sees in any layer; None for all."""
        windows = [s.attention.window for s in self.layers if s.attention]
        known = [w for w in windows if w is not None]
        return max(known) if known and len(known) == len(windows) else None

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

    @property
    def recurrent_dtype(self) -> torch.dtype:
        """float32, or float64 for a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    def conv_bytes_per_sequence(self, ring_len: int) -> int:
        """Bytes of conv rings per slot, all sites of all layers."""
        return self._conv_channels * ring_len * self.dtype.itemsize

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of recurrent state per slot, all layers."""
        elements = sum(s.recurrent.elements for s in self.layers if s.recurrent)
        return elements * self.recurrent_dtype.itemsize

    def slot_bytes(self, ring_len: int) -> int:
        """Bytes of a slot: everything of a sequence that does not grow with it."""
        return self.conv_bytes_per_sequence(ring_len) + self.recurrent_bytes

    @property
    def tail_bytes(self) -> int:
        """Bytes of a tail, what of a slot is stored at one position: the last W - 1 inputs of
        every conv site, and the recurrent state."""
        elements = sum(c.channels * (c.width - 1) for s in self.layers for c in s.convs.values())
        return elements * self.dtype.itemsize + self.recurrent_bytes

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
    recurrent: Tensor | None = None
    """[slots, heads, key_dim, value_dim] float32. Holds anything where a sequence starts: at
    position 0 the state reads as zero."""
