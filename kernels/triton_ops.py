"""The Triton backend: `Ops` with every step op as a kernel under the same signature.

Everything here can be captured in a CUDA graph: no synchronisation, no tuning, no allocation but
outputs and scratch from torch's allocator, geometry from shapes and the batch's bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import triton_attention, triton_conv, triton_linear, triton_mlp, triton_norm, triton_qkv
from .ops import Ops

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import FlatBatch
    from .filters import ConvFilter
    from .ops import PackedLinear, QKNorm


class TritonOps(Ops):
    """Triton kernels; `embed` and `moe` are the reference's."""

    name = "triton"

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See `Ops.linear`: a Triton kernel for few rows, where the table says so, or cuBLAS."""
        return triton_linear.linear(x, packed.weight, packed.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return triton_norm.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`. The norm is of the rounded sum."""
        return triton_norm.add_rms_norm(x, residual, weight, eps)

    def conv(
        self, x: Tensor, z: Tensor | None, filters: ConvFilter, ring: Tensor, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.conv`."""
        return triton_conv.conv(x, z, filters, ring, batch)

    def qkv_rope_write(
        self,
        qkv: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        norm: QKNorm | None,
        rope: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: FlatBatch,
    ) -> Tensor:
        """See `Ops.qkv_rope_write`."""
        return triton_qkv.qkv_rope_write(qkv, z, filters, ring, norm, rope, k_pages, v_pages, batch)

    def attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: FlatBatch,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """See `Ops.attention`. Padding rows are left unwritten."""
        return triton_attention.attention(q, k_pages, v_pages, batch, scale, window)

    def conv_add_rms_norm(
        self,
        x: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.conv_add_rms_norm`. The norm is of the rounded sum."""
        if filters is None:
            return triton_norm.add_rms_norm(x, residual, weight, eps)
        assert ring is not None
        return triton_norm.conv_add_rms_norm(x, z, filters, ring, residual, weight, eps, batch)

    def conv_silu_mul(
        self,
        gate_up: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        batch: FlatBatch,
    ) -> Tensor:
        """See `Ops.conv_silu_mul`."""
        if filters is None:
            return triton_mlp.silu_mul(gate_up)
        assert ring is not None
        return triton_mlp.conv_silu_mul(gate_up, z, filters, ring, batch)
