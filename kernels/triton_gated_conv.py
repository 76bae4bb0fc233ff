# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""A static convolution between two gates, c * conv(b * x), in one launch.

The ring holds the product b * x, rounded as the activations are. Knows nothing of generated
filters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_conv import ring_row_stride, step_mode
from .triton_launch import overlapped, start_next, wait_previous
from .triton_recurrent_step import INDICES

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter


@triton.jit
def _product(line, column, D: tl.constexpr, mask):
    """b * x of some rows, rounded to their dtype. -> [M, N]."""
    b = tl.load(line + column[None, :], mask=mask, other=0.0)
    x = tl.load(line + 2 * D + column[None, :], mask=mask, other=0.0)
    return (b.to(tl.float32) * x.to(tl.float32)).to(b.dtype)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=INDICES)
def _gated_conv_kernel(
    x,
    x_stride,
    static,
    bias,
    ring,
    ring_stride,
    out,
    positions,
    row_seq,
    starts,
    slots,
    ring_rows,
    count,
    D: tl.constexpr,
    W: tl.constexpr,
    RING: tl.constexpr,
    BIAS: tl.constexpr,
    STORE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    column = tl.program_id(0) * N + tl.arange(0, N)
    valid = column < D
    taps = ()
    for w in tl.static_range(W):
        taps = taps + (tl.load(static + w * D + column, mask=valid, other=0.0),)
    y = tl.zeros((M, N), tl.float32)
    if BIAS:
        y += tl.load(bias + column, mask=valid, other=0.0)[None, :]
    row = tl.program_id(1) * M + tl.arange(0, M)
    position = tl.load(positions + row, mask=row < count, other=-1)
    keep = (row < count) & (position >= 0)
    seq = tl.load(row_seq + row, mask=keep, other=0)
    local = position - tl.load(starts + seq, mask=keep, other=0)
    slot = tl.load(slots + seq, mask=keep, other=0).to(tl.int64)
    # The windows of earlier steps are on their way before the kernel before is done: until this
    # kernel, none of the step writes them.
    olders = ()
    for w in tl.static_range(1, W):
        far = (keep & (local < w) & (position >= w))[:, None] & valid[None, :]
        place = slot * RING + ((position - w) & (RING - 1))
        older = tl.load(ring + place[:, None] * ring_stride + column[None, :], mask=far, other=0.0)
        olders = olders + (older.to(tl.float32),)
    wait_previous(PDL)
    line = x + row[:, None].to(tl.int64) * x_stride
    inside = keep[:, None] & valid[None, :]
    now = _product(line, column, D, inside)
    y += taps[0][None, :] * now.to(tl.float32)
    for w in tl.static_range(1, W):
        near = (keep & (local >= w))[:, None] & valid[None, :]
        recent = _product(line - w * x_stride, column, D, near)
        y += taps[w][None, :] * (recent.to(tl.float32) + olders[w - 1])
    c = tl.load(line + D + column[None, :], mask=inside, other=0.0).to(tl.float32)
    target = out + row[:, None].to(tl.int64) * D + column[None, :]
    tl.store(target, (c * y).to(out.dtype.element_ty), mask=(row < count)[:, None] & valid[None, :])
    if STORE:
        ring_row = tl.load(ring_rows + row, mask=keep, other=-1)
        stored = (ring_row >= 0)[:, None] & valid[None, :]
        tl.store(ring + ring_row[:, None] * ring_stride + column[None, :], now, mask=stored)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def _product_store_kernel(
    x,
    x_stride,
    ring,
    ring_stride,
    offsets,
    ring_rows,
    D: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The last ring_len rows of each sequence: only they survive the step."""
    start_next(PDL)
    wait_previous(PDL)
    seq = tl.program_id(0)
    row = tl.load(offsets + seq + 1) - 1 - tl.program_id(1)
    if row >= tl.load(offsets + seq):
        ring_row = tl.load(ring_rows + row)
        column = tl.program_id(2) * N + tl.arange(0, N)
        line = x + row.to(tl.int64) * x_stride + tl.zeros((1, 1), tl.int32)
        value = _product(line, column, D, (column < D)[None, :])
        target = ring + ring_row * ring_stride + column[None, :]
        tl.store(target, value, mask=(column < D)[None, :] & (ring_row >= 0))


def gated_conv(x: Tensor, filters: ConvFilter, ring: Tensor, batch: FlatBatch) -> Tensor:
    """See `Ops.gated_conv`. A chunk that wraps the ring takes a second launch for its store."""
    count, width = len(x), x.shape[1] // 3
    out = torch.empty((count, width), dtype=x.dtype, device=x.device)
    mode = step_mode(filters, batch)
    rows = 1 if count <= 32 else 4 if count <= 256 else 16
    block = min(256, triton.next_power_of_2(width))
    _gated_conv_kernel[(triton.cdiv(width, block), triton.cdiv(count, rows))](
        x, x.stride(0), filters.static, filters.static if filters.bias is None else filters.bias,
        ring, ring_row_stride(ring), out, batch.positions, batch.row_seq, batch.starts,
        batch.slots, batch.ring_rows, count, D=width, W=filters.width, RING=batch.ring_len,
        BIAS=filters.bias is not None, STORE=mode != "long", M=rows, N=block, num_warps=4,
        **overlapped(x),
    )  # fmt: skip
    if mode == "long":
        block = min(1024, triton.next_power_of_2(width))
        grid = (len(batch.slots), min(batch.ring_len, batch.max_rows), triton.cdiv(width, block))
        _product_store_kernel[grid](
            x, x.stride(0), ring, ring_row_stride(ring), batch.offsets, batch.ring_rows,
            D=width, N=block, num_warps=4, **overlapped(x),
        )  # fmt: skip
    return out
