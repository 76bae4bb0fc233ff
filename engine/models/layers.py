"""Blocks of a decoder layer: attention, and MLP or experts.

A block takes its normed input and the residual, and hands on both for the next block: the residual
add and the next norm are part of what follows its last linear layer, so that they can share a
launch with that layer's convolution. Blocks know nothing of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ...cache.specs import LayerState
    from ...kernels import AttentionParts, ConvFilter, FlatBatch, MLPParts, Ops, PackedLinear
    from .config import ExpertsConfig


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's parameters."""

    weight: Tensor
    eps: float


class AttentionBlock:
    """q, k, v -> convolution, norm, RoPE -> attention -> o -> convolution, residual, norm."""

    def __init__(
        self,
        ops: Ops,
        parts: AttentionParts,
        input_conv: ConvFilter | None = None,
        gate: slice | None = None,
    ) -> None:
        """
        Args:
            input_conv: a convolution of the block's input.
            gate: columns of the qkv linear's output whose sigmoid multiplies what o reads.
        """
        self._ops, self._parts = ops, parts
        self._input_conv, self._gate = input_conv, gate

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: Norm,
        rope: Tensor,
        state: LayerState,
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (input of the next block, residual)."""
        assert state.k_pages is not None
        assert state.v_pages is not None
        if self._input_conv is not None:
            x = self._ops.conv(x, None, self._input_conv, state.rings["mixer_in"], batch)
        if self._gate is not None:
            return self._gated(x, residual, next_norm, rope, state, batch)
        return self._ops.attention_block(
            self._parts,
            x,
            residual,
            next_norm.weight,
            next_norm.eps,
            rope,
            state.k_pages,
            state.v_pages,
            state.rings,
            batch,
        )

    def _gated(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: Norm,
        rope: Tensor,
        state: LayerState,
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor]:
        """As `Ops.attention_block`, with the gate and without convolutions."""
        ops, p, k_pages, v_pages = self._ops, self._parts, state.k_pages, state.v_pages
        assert k_pages is not None
        assert v_pages is not None
        assert self._gate is not None
        out = ops.linear(x, p.qkv)
        qkv = out[:, : (p.q_heads + 2 * p.kv_heads) * p.head_dim]
        q = ops.qkv_rope_write(qkv, None, None, None, p.qk_norm, rope, k_pages, v_pages, batch)
        attended = ops.attention(q, k_pages, v_pages, batch, p.head_dim**-0.5, p.window)
        y = ops.linear(ops.sigmoid_mul(attended, out[:, self._gate]), p.o)
        return ops.add_rms_norm(y, residual, next_norm.weight, next_norm.eps)


class MLPBlock:
    """gate, up -> convolution, SiLU product -> down -> convolution, residual, norm."""

    def __init__(self, ops: Ops, parts: MLPParts, input_conv: ConvFilter | None = None) -> None:
        """`input_conv`: a convolution of the block's input."""
        self._ops, self._parts, self._input_conv = ops, parts, input_conv

    def __call__(
        self, x: Tensor, residual: Tensor, next_norm: Norm, state: LayerState, batch: FlatBatch
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (input of the next block, residual)."""
        if self._input_conv is not None:
            x = self._ops.conv(x, None, self._input_conv, state.rings["mlp_in"], batch)
        return self._ops.mlp_block(
            self._parts, x, residual, next_norm.weight, next_norm.eps, state.rings, batch
        )


@dataclass(frozen=True)
class SharedExpert:
    """The expert that every token goes through, times the sigmoid of its own gate."""

    gate_up: PackedLinear
    down: PackedLinear
    gate: PackedLinear
    """One row."""


class ExpertsBlock:
    """Router -> top-k SwiGLU experts, and the shared one -> residual, norm."""

    def __init__(
        self,
        ops: Ops,
        config: ExpertsConfig,
        router: PackedLinear,
        gate_up: Tensor,
        down: Tensor,
        shared: SharedExpert | None,
    ) -> None:
        self._ops = ops
        self._experts = config
        self._router, self._gate_up, self._down = router, gate_up, down
        self._shared = shared

    def __call__(
        self, x: Tensor, residual: Tensor, next_norm: Norm, state: LayerState, batch: FlatBatch
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (input of the next block, residual)."""
        ops = self._ops
        logits = ops.linear(x, self._router)
        y = ops.moe(
            x,
            logits,
            self._gate_up,
            self._down,
            self._experts.per_token,
            self._experts.normalize,
        )
        if self._shared is not None:
            hidden = ops.silu_linear(x, self._shared.gate_up)
            y = y + ops.sigmoid_mul(
                ops.linear(hidden, self._shared.down), ops.linear(x, self._shared.gate)
            )
        return ops.add_rms_norm(y, residual, next_norm.weight, next_norm.eps)
