# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Linear layers for few rows: a GEMV and a skinny GEMM that stream the weights once.

At few rows a linear layer is a read of its weights; cuBLAS leaves a third of the bus idle on the
smaller ones. The table in `tuning` says where these kernels win, everything else is cuBLAS.

Knows nothing of what is multiplied. Weights are [out, in], as torch keeps them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tuning


@triton.jit(do_not_specialize=["count"])
def _gemv_kernel(
    x,
    x_stride,
    weight,
    bias,
    out,
    count,
    out_features,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
):
    """At most M rows of x. Products are kept apart per lane and summed once, at the end."""
    n = tl.program_id(0) * N + tl.arange(0, N)
    valid = n < out_features
    totals = ()
    for _m in tl.static_range(M):
        totals = totals + (tl.zeros((N, BK), tl.float32),)
    # Unrolled, so that all loads of weights are in flight together.
    for at in tl.static_range(0, K, BK):
        k = at + tl.arange(0, BK)
        mask = valid[:, None] & (k < K)[None, :]
        w = tl.load(weight + n[:, None].to(tl.int64) * K + k[None, :], mask=mask, other=0.0)
        sums = ()
        for m in tl.static_range(M):
            # Spread over the outputs, so that it has the layout of the weights: no exchange.
            at_x = x + m * x_stride + tl.broadcast_to(k[None, :], (N, BK))
            there = tl.full((1, 1), m, tl.int32) < count
            value = tl.load(at_x, mask=mask & there, other=0.0)
            sums = sums + (totals[m] + w.to(tl.float32) * value.to(tl.float32),)
        totals = sums
    for m in tl.static_range(M):
        y = tl.sum(totals[m], axis=1)
        if BIAS:
            y += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
        place = out + m * out_features + n
        there = tl.full((1,), m, tl.int32) < count
        tl.store(place, y.to(out.dtype.element_ty), mask=valid & there)


@triton.jit(do_not_specialize=["count"])
def _skinny_kernel(
    x,
    x_stride,
    weight,
    bias,
    out,
    count,
    out_features,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0) * N + tl.arange(0, N)
    m = tl.arange(0, M)
    valid = n < out_features
    keep = m < count
    total = tl.zeros((N, M), tl.float32)
    for at in range(0, K, BK):
        k = at + tl.arange(0, BK)
        inside = (k < K)[None, :]
        w_at = weight + n[:, None].to(tl.int64) * K + k[None, :]
        w = tl.load(w_at, mask=valid[:, None] & inside, other=0.0)
        value = tl.load(
            x + m[:, None] * x_stride + k[None, :], mask=keep[:, None] & inside, other=0.0
        )
        total = tl.dot(w, tl.trans(value), acc=total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[:, None]
    place = out + m[None, :] * out_features + n[:, None]
    tl.store(place, total.to(out.dtype.element_ty), mask=valid[:, None] & keep[None, :])


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: tuning.LinearTile | None = None
) -> Tensor:
    """x [T, in], weight [out, in], bias [out] -> [T, out]."""
    count = len(x)
    out_features, in_features = weight.shape
    tile = tile or tuning.linear_tile(count, out_features, in_features, weight.dtype)
    if tile is None or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty((count, out_features), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out_features, tile.outputs),)
    shift = weight if bias is None else bias
    kernel = _gemv_kernel if tile.rows < 16 else _skinny_kernel
    kernel[grid](
        x, x.stride(0), weight, shift, out, count, out_features, K=in_features,
        BIAS=bias is not None, M=tile.rows, N=tile.outputs, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
