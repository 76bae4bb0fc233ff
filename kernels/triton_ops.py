"""The Triton backend: `Ops` with every step op as a kernel under the same signature.

Everything here can be captured in a CUDA graph: no synchronisation, no tuning, no allocation but
outputs and scratch from torch's allocator, geometry from shapes and the batch's bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import (
    triton_attention,
    triton_compile,
    triton_conv,
    triton_gated_conv,
    triton_generated_conv,
    triton_linear,
    triton_mlp,
    triton_moe,
    triton_norm,
    triton_qkv,
    triton_recurrent,
    triton_sampling,
    triton_tokens,
)
from .ops import Ops
from .weights import PackedLinear

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from .batch import FlatBatch
    from .filters import ConvFilter
    from .recurrent import DeltaParts, SSDParts
    from .weights import QKNorm


class TritonOps(Ops):
    """Triton kernels."""

    name = "triton"
    is_capturable = True

    def compiling(self) -> AbstractContextManager[bool]:
        """See `Ops.compiling`."""
        return triton_compile.compiling()

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See `Ops.linear`: a Triton kernel for few rows, where the table says so, or cuBLAS."""
        return triton_linear.linear(x, packed.weight, packed.bias)

    def silu_linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See `Ops.silu_linear`: in one launch where `linear` is a Triton kernel."""
        hidden = triton_linear.silu_linear(x, packed.weight, packed.bias)
        return super().silu_linear(x, packed) if hidden is None else hidden

    def fed_tokens(self, token_ids: Tensor, last: Tensor, batch: FlatBatch) -> Tensor:
        """See `TokenOps.fed_tokens`."""
        return triton_tokens.fed_tokens(token_ids, last, batch)

    def keep_tokens(self, ids: Tensor, rows: Tensor, last: Tensor, batch: FlatBatch) -> None:
        """See `TokenOps.keep_tokens`."""
        triton_tokens.keep_tokens(ids, rows, last, batch)

    def take_rows(self, table: Tensor, rows: Tensor) -> Tensor:
        """See `TokenOps.take_rows`; a row outside the table gives zeros."""
        return triton_tokens.embed(rows, table)

    def embed(self, token_ids: Tensor, table: Tensor | PackedLinear) -> Tensor:
        """See `TokenOps.embed`; an id outside the table gives zeros."""
        return triton_tokens.embed(
            token_ids, table.weight if isinstance(table, PackedLinear) else table
        )

    def argmax(self, logits: Tensor) -> Tensor:
        """See `TokenOps.argmax`."""
        return triton_tokens.argmax(logits)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        u: Tensor,
    ) -> Tensor:
        """See `TokenOps.sample`."""
        return triton_sampling.sample(logits, temperature, top_k, top_p, min_p, u)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        return triton_norm.rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`. The norm is of the rounded sum."""
        return triton_norm.add_rms_norm(x, residual, weight, eps)

    def linear_add_rms_norm(
        self, x: Tensor, packed: PackedLinear, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.linear_add_rms_norm`: the norm may add up parts of the depth."""
        parts = triton_linear.linear_parts(x, packed.weight, packed.bias)
        y = self.linear(x, packed) if parts is None else parts
        return triton_norm.add_rms_norm(y, residual, weight, eps)

    def conv(
        self, x: Tensor, z: Tensor | None, filters: ConvFilter, ring: Tensor, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.conv`."""
        return triton_conv.conv(x, z, filters, ring, batch)

    def gated_conv(self, x: Tensor, filters: ConvFilter, ring: Tensor, batch: FlatBatch) -> Tensor:
        """See `Ops.gated_conv`. The convolution is not rounded before the gate."""
        return triton_gated_conv.gated_conv(x, filters, ring, batch)

    def delta_rule(
        self,
        parts: DeltaParts,
        qkv: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        gate: Tensor,
        b: Tensor,
        a: Tensor,
        state: Tensor,
        batch: FlatBatch,
    ) -> Tensor:
        """See `Ops.delta_rule`. Padding rows are left unwritten."""
        if filters is not None and parts.generator is not None:
            assert z is not None
            assert ring is not None
            if triton_generated_conv.can_generate(parts.generator, filters, batch):
                qkv = triton_generated_conv.generated_conv(
                    qkv, z, parts.generator, filters, ring, batch
                )
                z = filters = ring = None
            else:
                z = self.linear(triton_generated_conv.silu_code(z), parts.generator)
        return triton_recurrent.delta_rule(parts, qkv, z, filters, ring, gate, b, a, state, batch)

    def ssd(
        self,
        parts: SSDParts,
        xbc: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        gate: Tensor,
        dt: Tensor,
        state: Tensor,
        batch: FlatBatch,
    ) -> Tensor:
        """See `Ops.ssd`. Padding rows are left unwritten."""
        return triton_recurrent.ssd(parts, xbc, z, filters, ring, gate, dt, state, batch)

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

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        return triton_mlp.silu_mul(gate_up)

    def conv_silu_mul(
        self,
        gate_up: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        batch: FlatBatch,
    ) -> Tensor:
        """See `Ops.conv_silu_mul`. In one launch where there are filters."""
        if filters is None:
            return self.silu_mul(gate_up)
        assert ring is not None
        return triton_mlp.conv_silu_mul(gate_up, z, filters, ring, batch)

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Tensor,
        down: Tensor,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """See `Ops.moe`. Of experts equally probable the first is chosen."""
        return triton_moe.moe(x, router_logits, gate_up, down, top_k, normalize)
