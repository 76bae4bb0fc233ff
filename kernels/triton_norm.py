# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""RMSNorm, residual add + RMSNorm, a convolution before both, and the norm of q and k rows.

One program a row, the whole row in registers. Knows nothing of layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_conv
from .triton_filters import (
    convolve,
    join_past,
    load_code,
    load_past,
    load_weights,
    load_window,
    locate_rows,
)
from .triton_launch import overlapped, start_next, wait_previous

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter
    from .ops import QKNorm


@triton.jit
def _norm_kernel(
    x,
    x_stride,
    residual,
    weight,
    out,
    sum_out,
    H: tl.constexpr,
    EPS: tl.constexpr,
    ADD: tl.constexpr,
    PARTS: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """PARTS: x is [PARTS, rows, H] float32, and its sum, rounded, what is normed."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, N)
    valid = column < H
    scale = tl.load(weight + column, mask=valid, other=0.0).to(tl.float32)
    wait_previous(PDL)
    value = tl.load(x + row * x_stride + column, mask=valid, other=0.0)
    if PARTS > 1:
        # All on their way before the first is added.
        others = ()
        for i in tl.static_range(1, PARTS):
            at = x + (i * tl.num_programs(0) + row) * x_stride + column
            others = others + (tl.load(at, mask=valid, other=0.0),)
        for i in tl.static_range(PARTS - 1):
            value += others[i]
        value = value.to(out.dtype.element_ty)
    if ADD:
        before = tl.load(residual + row * H + column, mask=valid, other=0.0)
        # What the next layer reads is the rounded sum, so the norm is of that.
        value = (value.to(tl.float32) + before.to(tl.float32)).to(out.dtype.element_ty)
        tl.store(sum_out + row * H + column, value, mask=valid)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / H + EPS)
    normed = (wide * inverse * scale).to(out.dtype.element_ty)
    tl.store(out + row * H + column, normed, mask=valid)


@triton.jit(do_not_specialize=["count"])
def _conv_norm_kernel(
    x,
    x_stride,
    z,
    z_stride,
    static,
    bias,
    ring,
    ring_stride,
    residual,
    weight,
    out,
    sum_out,
    positions,
    row_seq,
    starts,
    slots,
    ring_rows,
    count,
    H: tl.constexpr,
    EPS: tl.constexpr,
    Z_START: tl.constexpr,
    W: tl.constexpr,
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    RING: tl.constexpr,
    MODE: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    first = tl.program_id(0)
    row = first + tl.arange(0, 1)
    column = tl.arange(0, N)
    valid = column < H
    weights = load_weights(
        static, static, bias, column, valid, column, valid, H, W, 0, KIND, GENERATE, BIAS, 1, N
    )
    scale = tl.load(weight + column[None, :], mask=valid[None, :], other=0.0).to(tl.float32)
    meta = (positions, row_seq, starts, slots, ring_rows)
    keep, spot, ring_row = locate_rows(row, first, count, meta, W, RING, MODE, 1)
    past = load_past(ring, ring_stride, spot, column, valid, W, RING, MODE)
    wait_previous(PDL)
    code = load_code(
        z, z_stride, row, keep, Z_START, 0, column, valid, W, 0, HEAD, KIND, GENERATE, N
    )
    if MODE == "long":
        window = load_window(
            x, x_stride, ring, ring_stride, row, first, count, meta, spot,
            column, column, valid, valid, W, RING, MODE, 1,
        )  # fmt: skip
    else:
        window = join_past(x, x_stride, row, count, spot, past, column, valid, W, MODE)
    place = row[:, None].to(tl.int64) * H + column[None, :]
    inside = keep[:, None] & valid[None, :]
    before = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)

    y = convolve(window, code, weights, W, 0, KIND, GENERATE, SCALE, SILU, 1, N)
    value = (y + before).to(out.dtype.element_ty)
    tl.store(sum_out + place, value, mask=inside)
    wide = tl.where(inside, value.to(tl.float32), 0.0)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / H + EPS)[:, None]
    tl.store(out + place, (wide * inverse * scale).to(out.dtype.element_ty), mask=inside)
    if MODE != "long":
        target = ring + ring_row[:, None] * ring_stride + column[None, :]
        tl.store(target, window[0], mask=(ring_row >= 0)[:, None] & valid[None, :])


@triton.jit
def _norm_qk_kernel(
    x,
    x_stride,
    weight_q,
    weight_k,
    out,
    Q: tl.constexpr,
    KV: tl.constexpr,
    GROUP_Q: tl.constexpr,
    GROUP_K: tl.constexpr,
    EPS: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """One group (a head, or all of q or k) of one row; the last groups copy v."""
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    q_groups: tl.constexpr = Q // GROUP_Q
    k_groups: tl.constexpr = KV // GROUP_K
    is_q = group < q_groups
    is_v = group >= q_groups + k_groups
    width = tl.where(is_q, GROUP_Q, GROUP_K)
    start = tl.where(is_q, group * GROUP_Q, Q + (group - q_groups) * GROUP_K)
    column = tl.arange(0, N)
    valid = column < width
    scale = tl.load(tl.where(is_q, weight_q, weight_k) + column, mask=valid, other=0.0)
    wait_previous(PDL)
    value = tl.load(x + row * x_stride + start + column, mask=valid, other=0.0)
    wide = value.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / width + EPS)
    normed = (wide * inverse * scale.to(tl.float32)).to(value.dtype)
    place = row * (Q + 2 * KV) + start + column
    tl.store(out + place, tl.where(is_v, value, normed), mask=valid)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`."""
    width = x.shape[-1]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, width).contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_norm(rows, rows, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `Ops.add_rms_norm`; x may also be parts of a sum [parts, T, H], added up in order."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch_norm(x, residual.contiguous(), weight, out, total, eps, add=True)
    return out, total


def conv_add_rms_norm(
    x: Tensor,
    z: Tensor | None,
    filters: ConvFilter,
    ring: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    batch: FlatBatch,
) -> tuple[Tensor, Tensor]:
    """See `Ops.conv_add_rms_norm`.

    Static and head-wise filters take one launch. Low-rank ones take two: `up` is as wide as the
    row, so the row's work must be spread over many programs, and the norm needs the whole row.
    """
    residual = residual.contiguous()
    count, width = x.shape
    whole = len(filters.streams) == 1 and filters.channels == width <= 16384
    if filters.kind == "lowrank" or not whole:
        total = triton_conv.conv(x, z, filters, ring, batch, residual)
        return rms_norm(total, weight, eps), total
    x = x if x.stride(1) == 1 else x.contiguous()
    z = z if z is None or z.stride(1) == 1 else z.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    step = triton_conv.step_mode(filters, batch)
    block = triton.next_power_of_2(width)
    pieces = triton_conv.segments(filters.streams, width)
    mode = triton_conv.generate_mode(filters, pieces, block, "none")
    _conv_norm_kernel[(count,)](
        x, x.stride(0), x if z is None else z, 0 if z is None else z.stride(0), filters.static,
        filters.static if filters.bias is None else filters.bias,
        ring, triton_conv.ring_row_stride(ring), residual, weight, out, total,
        batch.positions, batch.row_seq, batch.starts, batch.slots, batch.ring_rows, count,
        H=width, EPS=eps, Z_START=filters.streams[0].z_start, W=filters.width,
        HEAD=filters.head_size, KIND=filters.kind, GENERATE=mode, BIAS=filters.bias is not None,
        SCALE=filters.scale, SILU=filters.activation == "silu", RING=batch.ring_len,
        MODE=step, N=block, num_warps=_row_warps(block), **overlapped(x),
    )  # fmt: skip
    if step == "long":
        triton_conv.store_ring(x, filters, ring, batch)
    return out, total


def norm_qk(x: Tensor, norm: QKNorm, q_heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """RMSNorm of q and k, v copied. x [T, (Hq + 2 Hkv) d] -> a new tensor of the same shape."""
    x = x if x.stride(1) == 1 else x.contiguous()
    q, kv = q_heads * head_dim, kv_heads * head_dim
    group_q, group_k = (head_dim, head_dim) if norm.mode == "head" else (q, kv)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(max(group_q, group_k))
    _norm_qk_kernel[(len(x), q // group_q + 2 * (kv // group_k))](
        x, x.stride(0), norm.q, norm.k, out,
        Q=q, KV=kv, GROUP_Q=group_q, GROUP_K=group_k, EPS=norm.eps, N=block,
        num_warps=_row_warps(block), **overlapped(x),
    )  # fmt: skip
    return out


def _launch_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    out: Tensor,
    total: Tensor,
    eps: float,
    *,
    add: bool,
) -> None:
    rows, width = out.view(-1, out.shape[-1]).shape
    block = triton.next_power_of_2(width)
    _norm_kernel[(rows,)](
        x, x.stride(-2), residual, weight, out, total,
        H=width, EPS=eps, ADD=add, PARTS=len(x) if x.dim() == 3 else 1, N=block,
        num_warps=_row_warps(block), **overlapped(x),
    )  # fmt: skip


def _row_warps(block: int) -> int:
    return min(max(block // 512, 1), 8)
