# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""silu(gate) * up, with the convolutions of gate and up in the same launch.

A tile is some rows x the same channels of gate and of up. Knows nothing of the linear layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_conv, tuning
from .triton_filters import (
    convolve,
    join_past,
    load_code,
    load_past,
    load_weights,
    load_window,
    locate_rows,
    swap_columns,
    swap_rows,
)
from .triton_launch import overlapped, start_next, wait_previous

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter


@triton.jit(do_not_specialize=["count"])
def _silu_mul_kernel(
    x,
    x_stride,
    out,
    count,
    INNER: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(0) * N + tl.arange(0, N)
    inside = (row < count)[:, None] & (column < INNER)[None, :]
    line = x + row[:, None].to(tl.int64) * x_stride + column[None, :]
    gate = tl.load(line, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(line + INNER, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    place = out + row[:, None].to(tl.int64) * INNER + column[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _conv_silu_mul_kernel(
    x,
    x_stride,
    z,
    z_stride,
    up,
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
    GATE: tl.constexpr,
    UP: tl.constexpr,
    INNER: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    RING: tl.constexpr,
    MODE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    REPEAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """GATE and UP: (first covered channel, first z column)."""
    start_next(PDL)
    within = tl.program_id(0) * N + tl.arange(0, N)
    valid = within < INNER
    gate_channel = GATE[0] + within
    up_channel = UP[0] + within
    order = within
    if GENERATE == "swap":
        order = tl.program_id(0) * N + swap_columns(N)
    order_keep = order < INNER
    gate_weights = load_weights(
        up, static, bias, gate_channel, valid, GATE[0] + order, order_keep,
        D, W, R, KIND, GENERATE, BIAS, M, N,
    )  # fmt: skip
    up_weights = load_weights(
        up, static, bias, up_channel, valid, UP[0] + order, order_keep,
        D, W, R, KIND, GENERATE, BIAS, M, N,
    )  # fmt: skip
    meta = (positions, row_seq, starts, slots, ring_rows)
    for i in range(REPEAT):
        first_row = (tl.program_id(1) * REPEAT + i) * M
        row = first_row + tl.arange(0, M)
        keep, spot, ring_row = locate_rows(row, first_row, count, meta, W, RING, MODE, M)
        gate_past = load_past(ring, ring_stride, spot, gate_channel, valid, W, RING, MODE)
        up_past = load_past(ring, ring_stride, spot, up_channel, valid, W, RING, MODE)
        wait_previous(PDL)
        code_row = row
        if GENERATE == "swap":
            code_row = first_row + swap_rows(M)
        use = code_row < count
        gate_code = load_code(
            z, z_stride, code_row, use, GATE[1], tl.program_id(0) * N, within, valid,
            W, R, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
        up_code = load_code(
            z, z_stride, code_row, use, UP[1], tl.program_id(0) * N, within, valid,
            W, R, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
        if MODE == "long":
            gate_window = load_window(
                x, x_stride, ring, ring_stride, row, first_row, count, meta, spot,
                within, gate_channel, valid, valid, W, RING, MODE, M,
            )  # fmt: skip
            up_window = load_window(
                x, x_stride, ring, ring_stride, row, first_row, count, meta, spot,
                INNER + within, up_channel, valid, valid, W, RING, MODE, M,
            )  # fmt: skip
        else:
            gate_window = join_past(
                x, x_stride, row, count, spot, gate_past, within, valid, W, MODE
            )
            up_window = join_past(
                x, x_stride, row, count, spot, up_past, INNER + within, valid, W, MODE
            )
        gate = convolve(
            gate_window, gate_code, gate_weights, W, R, KIND, GENERATE, SCALE, SILU, M, N
        )
        value = convolve(up_window, up_code, up_weights, W, R, KIND, GENERATE, SCALE, SILU, M, N)
        y = gate * tl.sigmoid(gate) * value
        place = out + row[:, None].to(tl.int64) * INNER + within[None, :]
        tl.store(place, y.to(out.dtype.element_ty), mask=keep[:, None] & valid[None, :])
        if MODE != "long":
            target = ring + ring_row[:, None] * ring_stride
            mask = (ring_row >= 0)[:, None] & valid[None, :]
            tl.store(target + gate_channel[None, :], gate_window[0], mask=mask)
            tl.store(target + up_channel[None, :], up_window[0], mask=mask)


def silu_mul(gate_up: Tensor, rows: int | None = None) -> Tensor:
    """silu(gate) * up. gate_up [T, 2 I] -> [T, I]. `rows` of a program, if not what T suggests."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    count, inner = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((count, inner), dtype=gate_up.dtype, device=gate_up.device)
    rows = rows or (1 if count <= 32 else 4)
    block = min(512, triton.next_power_of_2(inner))
    grid = (triton.cdiv(inner, block), triton.cdiv(count, rows))
    _silu_mul_kernel[grid](
        gate_up, gate_up.stride(0), out, count, INNER=inner, M=rows, N=block, num_warps=4,
        **overlapped(gate_up),
    )  # fmt: skip
    return out


def conv_silu_mul(
    gate_up: Tensor,
    z: Tensor | None,
    filters: ConvFilter,
    ring: Tensor,
    batch: FlatBatch,
    tile: tuning.ConvTile | None = None,
) -> Tensor:
    """See `Ops.conv_silu_mul`. Convolves on its own if only one of the two is convolved."""
    count, inner = len(gate_up), gate_up.shape[1] // 2
    parts = _parts(filters, inner)
    if parts is None:
        return silu_mul(triton_conv.conv(gate_up, z, filters, ring, batch))
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    z = z if z is None or z.stride(1) == 1 else z.contiguous()
    out = torch.empty((count, inner), dtype=gate_up.dtype, device=gate_up.device)
    tile = tile or tuning.pair_tile(count, filters)
    mode = triton_conv.step_mode(filters, batch)
    pieces = triton_conv.segments(filters.streams, 2 * inner)
    grid = (triton.cdiv(inner, tile.channels), triton.cdiv(count, tile.rows * tile.repeat))
    _conv_silu_mul_kernel[grid](
        gate_up, gate_up.stride(0), gate_up if z is None else z, 0 if z is None else z.stride(0),
        gate_up if filters.up is None else filters.up, filters.static,
        filters.static if filters.bias is None else filters.bias,
        ring, triton_conv.ring_row_stride(ring), out,
        batch.positions, batch.row_seq, batch.starts, batch.slots, batch.ring_rows, count,
        GATE=parts[0], UP=parts[1], INNER=inner, D=filters.channels, W=filters.width,
        R=filters.rank, HEAD=filters.head_size, KIND=filters.kind,
        GENERATE=triton_conv.generate_mode(filters, pieces, tile.channels, tile.generate),
        BIAS=filters.bias is not None, SCALE=filters.scale, SILU=filters.activation == "silu",
        RING=batch.ring_len, MODE=mode,
        M=tile.rows, N=tile.channels, REPEAT=tile.repeat, num_warps=tile.warps,
        **overlapped(gate_up),
    )  # fmt: skip
    if mode == "long":
        triton_conv.store_ring(gate_up, filters, ring, batch)
    return out


def _parts(filters: ConvFilter, inner: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(first covered channel, first z column) of gate and of up, if a stream covers each."""
    edges = tuple((s.start, s.stop) for s in filters.streams)
    if edges != ((0, inner), (inner, 2 * inner)):
        return None
    gate, up = filters.streams
    return (0, gate.z_start), (inner, up.z_start)
