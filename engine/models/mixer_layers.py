"""Blocks that stand where attention does: LFM2's gated convolution, the gated delta rule, Mamba-2.

They are called as attention blocks are, and know as little of checkpoints. What precedes the
recurrence comes from one linear layer, whose output columns are: what is convolved, the gate, the
recurrence's own scalars, and the code of generated filters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ...cache.specs import LayerState
    from ...kernels import ConvFilter, Convolved, DeltaParts, FlatBatch, Ops, PackedLinear, SSDParts
    from .layers import Norm


@dataclass(frozen=True)
class ShortConvBlock:
    """b, c, x -> c * conv(b * x) -> out -> residual, norm."""

    ops: Ops
    into: PackedLinear
    filters: ConvFilter
    out: PackedLinear

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
        ops = self.ops
        y = ops.gated_conv(ops.linear(x, self.into), self.filters, state.rings["conv"], batch)
        return ops.linear_add_rms_norm(y, self.out, residual, next_norm.weight, next_norm.eps)


@dataclass(frozen=True)
class DeltaBlock:
    """q, k, v -> convolution -> gated delta rule, gated norm -> out -> residual, norm."""

    ops: Ops
    parts: DeltaParts
    into: PackedLinear
    """Columns: q, k, v, gate, b, a, z."""
    conv: Convolved
    out: PackedLinear

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
        assert state.recurrent is not None
        ops, p = self.ops, self.parts
        columns = ops.linear(x, self.into)
        width, inner, heads = sum(p.widths), p.widths[2], p.value_heads
        qkv, gate = columns[:, :width], columns[:, width : width + inner]
        b, a = columns[:, width + inner : width + inner + 2 * heads].chunk(2, dim=1)
        y = ops.delta_rule(
            p,
            qkv,
            self.conv.code(columns),
            self.conv.filters,
            state.rings.get("qkv"),
            gate,
            b,
            a,
            state.recurrent,
            batch,
        )
        return ops.linear_add_rms_norm(y, self.out, residual, next_norm.weight, next_norm.eps)


@dataclass(frozen=True)
class Mamba2Block:
    """x, B, C -> convolution -> SSD, gated norm -> out -> residual, norm."""

    ops: Ops
    parts: SSDParts
    into: PackedLinear
    """Columns: gate, x, B, C, dt, z."""
    conv: Convolved
    out: PackedLinear

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
        assert state.recurrent is not None
        ops, p = self.ops, self.parts
        columns = ops.linear(x, self.into)
        inner, width = p.widths[0], sum(p.widths)
        xbc, dt = columns[:, inner : inner + width], columns[:, inner + width :][:, : p.heads]
        y = ops.ssd(
            p,
            xbc,
            self.conv.code(columns),
            self.conv.filters,
            state.rings["xbc"],
            columns[:, :inner],
            dt,
            state.recurrent,
            batch,
        )
        return ops.linear_add_rms_norm(y, self.out, residual, next_norm.weight, next_norm.eps)


MixerBlock = ShortConvBlock | DeltaBlock | Mamba2Block
