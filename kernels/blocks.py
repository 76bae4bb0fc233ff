"""The two blocks of a decoder layer, as records of what they are made of and as chains of ops.

A block takes its normed input and the residual, and hands on both for the next block. The chains
are what `Ops.attention_block` and `Ops.mlp_block` mean; a backend may run one as a single call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .batch import FlatBatch
    from .filters import ConvFilter
    from .ops import Ops, PackedLinear, QKNorm


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


def attention_block(
    ops: Ops,
    parts: AttentionParts,
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    rope: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    rings: Mapping[str, Tensor],
    batch: FlatBatch,
) -> tuple[Tensor, Tensor]:
    """q, k, v -> convolution, norm, RoPE -> attention -> o -> convolution, residual, next norm.

    x, residual [T, hidden] -> (normed input of the next block, residual). `norm` and `eps` are the
    next block's; rings are called "qkv" and "o".
    """
    p = parts
    out = ops.linear(x, p.qkv)
    q = ops.qkv_rope_write(
        out[:, : (p.q_heads + 2 * p.kv_heads) * p.head_dim],
        p.qkv_conv.code(out),
        p.qkv_conv.filters,
        rings.get("qkv"),
        p.qk_norm,
        rope,
        k_pages,
        v_pages,
        batch,
    )
    attended = ops.attention(q, k_pages, v_pages, batch, p.head_dim**-0.5, p.window)
    y = ops.linear(attended, p.o)
    return ops.conv_add_rms_norm(
        y[:, : residual.shape[1]],
        p.o_conv.code(out if p.o_code_from_input else y),
        p.o_conv.filters,
        rings.get("o"),
        residual,
        norm,
        eps,
        batch,
    )


def mlp_block(
    ops: Ops,
    parts: MLPParts,
    x: Tensor,
    residual: Tensor,
    norm: Tensor,
    eps: float,
    rings: Mapping[str, Tensor],
    batch: FlatBatch,
) -> tuple[Tensor, Tensor]:
    """gate, up -> convolution, SiLU product -> down -> convolution, residual, next norm.

    As `attention_block`; rings are called "gate_up" and "down".
    """
    p = parts
    out = ops.linear(x, p.gate_up)
    hidden = ops.conv_silu_mul(
        out[:, : 2 * p.intermediate],
        p.gate_up_conv.code(out),
        p.gate_up_conv.filters,
        rings.get("gate_up"),
        batch,
    )
    y = ops.linear(hidden, p.down)
    return ops.conv_add_rms_norm(
        y[:, : residual.shape[1]],
        p.down_conv.code(out if p.down_code_from_input else y),
        p.down_conv.filters,
        rings.get("down"),
        residual,
        norm,
        eps,
        batch,
    )
