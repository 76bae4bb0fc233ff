"""What the two blocks of a decoder layer are made of; `Ops.attention_block` and `Ops.mlp_block`
say what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .filters import ConvFilter
    from .weights import PackedLinear, QKNorm


@dataclass(frozen=True)
class Convolved:
    """The convolution after a linear layer, as a block applies it."""

    filters: ConvFilter | None
    z: slice
    """Columns of the generating linear's output that hold z; empty for static filters."""

    def code(self, out: Tensor) -> Tensor | None:
        """The z columns of `out`, or None for static filters."""
        return None if self.z.start == self.z.stop else out[:, self.z]


@dataclass(frozen=True)
class AttentionParts:
    """What an attention block is made of."""

    qkv: PackedLinear
    qkv_conv: Convolved
    o: PackedLinear
    o_conv: Convolved
    o_code_from_input: bool
    """The columns of o's z are in the output of qkv, not of o."""
    q_heads: int
    kv_heads: int
    head_dim: int
    qk_norm: QKNorm | None
    window: int | None


@dataclass(frozen=True)
class MLPParts:
    """What a gated MLP block is made of."""

    gate_up: PackedLinear
    gate_up_conv: Convolved
    down: PackedLinear
    down_conv: Convolved
    down_code_from_input: bool
    """The columns of down's z are in the output of gate_up, not of down."""
    intermediate: int
