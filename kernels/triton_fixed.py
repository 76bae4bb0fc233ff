# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""The Triton backend with one way to multiply and one to attend, whatever the number of rows.

A library picks its GEMM by the number of rows, and attention splits a context by the number of
sequences, and with them the order of additions. Here a row's result comes from the same tiles in
the same order in every batch, chunk and padding, so its bits do too. It costs speed: no splits, no
tuned shapes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import (
    triton_chunk_attention,
    triton_conv,
    triton_mlp,
    triton_moe,
    triton_qkv,
    triton_sampling,
    tuning,
)
from .ops import Ops
from .triton_norm import norm_qk
from .triton_ops import TritonOps

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter
    from .ops import PackedLinear, QKNorm

ROWS, COLUMNS, DEPTH = 64, 32, 128
"""Tile of the one GEMM: rows of x, outputs, and inputs per step."""

LOWRANK_TILE = tuning.ConvTile(16, 64, 4)
CONV_TILE = tuning.ConvTile(4, 128, 4)
ROPE_TILE = tuning.ConvTile(8, 64, 4)


class FixedTritonOps(TritonOps):
    """See the module."""

    name = "triton, deterministic"
    # Each op of its own in its own launch, as the reference composes them.
    silu_linear = Ops.silu_linear
    linear_add_rms_norm = Ops.linear_add_rms_norm
    conv_add_rms_norm = Ops.conv_add_rms_norm
    conv_silu_mul = Ops.conv_silu_mul

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See `Ops.linear`."""
        return fixed_linear(x, packed.weight, packed.bias)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        u: Tensor,
    ) -> Tensor:
        """See `Ops.sample`. One program a row, however few there are."""
        return triton_sampling.sample(logits, temperature, top_k, top_p, min_p, u, parts=0)

    def conv(
        self, x: Tensor, z: Tensor | None, filters: ConvFilter, ring: Tensor, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.conv`. One program for every step: tuned tiles sum filters in several orders,
        and a compiler fuses multiplications and additions of each program as it likes."""
        tile = LOWRANK_TILE if filters.kind == "lowrank" else CONV_TILE
        return triton_conv.conv(x, z, filters, ring, batch, tile=tile, mode="long")

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
        """See `Ops.qkv_rope_write`. The convolution in a launch of its own."""
        if filters is not None:
            assert ring is not None
            if norm is not None and norm.order == "norm_first":
                head_dim, kv_heads = k_pages.shape[3], k_pages.shape[1]
                q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
                qkv, norm = norm_qk(qkv, norm, q_heads, kv_heads, head_dim), None
            qkv = self.conv(qkv, z, filters, ring, batch)
        return triton_qkv.qkv_rope_write(
            qkv, None, None, None, norm, rope, k_pages, v_pages, batch, tile=ROPE_TILE
        )

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Tensor,
        down: Tensor,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """See `Ops.moe`. A row's sums do not depend on the block that it shares with others."""
        tile = tuning.expert_tile(x.element_size())
        return triton_moe.moe(x, router_logits, gate_up, down, top_k, normalize, tile)

    def attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: FlatBatch,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """See `Ops.attention`. Keys are met in tiles that begin at fixed positions."""
        q = q if q.is_contiguous() else q.contiguous()
        out = torch.empty((len(q), q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
        tile = tuning.chunk_tile(q.element_size(), q.shape[2])
        triton_chunk_attention.chunk(
            q, k_pages, v_pages, batch, scale, window, out, above=0, tile=tile, alike=True
        )
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`. One program for any number of rows: another one rounds the last bit
        otherwise."""
        return triton_mlp.silu_mul(gate_up, rows=1)


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,
    x_stride,
    weight,
    bias,
    out,
    rows,
    out_features,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
):
    m = tl.program_id(1) * M + tl.arange(0, M)
    n = tl.program_id(0) * N + tl.arange(0, N)
    k = tl.arange(0, BK)
    x_at = x + m.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_at = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((M, N), tl.float32)
    for at in range(0, K, BK):
        inside = k < K - at
        left = tl.load(x_at + at, mask=(m < rows)[:, None] & inside[None, :], other=0.0)
        right = tl.load(w_at + at, mask=(n < out_features)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(left, right, acc=total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[None, :]
    place = out + m.to(tl.int64)[:, None] * out_features + n[None, :]
    mask = (m < rows)[:, None] & (n < out_features)[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=mask)


def fixed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] (last axis contiguous) times weight [out, in] -> [..., out]."""
    out_features, in_features = weight.shape
    flat = x.reshape(-1, in_features)
    out = torch.empty((len(flat), out_features), dtype=x.dtype, device=x.device)
    if len(flat):
        depth = DEPTH if x.element_size() == 2 else DEPTH // 2
        grid = (triton.cdiv(out_features, COLUMNS), triton.cdiv(len(flat), ROWS))
        _linear_kernel[grid](
            flat, flat.stride(0), weight, weight if bias is None else bias, out, len(flat),
            out_features, K=in_features, BIAS=bias is not None, M=ROWS, N=COLUMNS, BK=depth,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out.view(*x.shape[:-1], out_features)
