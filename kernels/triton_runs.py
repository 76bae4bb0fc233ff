# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Long runs of rows with static or head-wise filters: inputs slide through registers.

A warp takes 256 / N runs of J consecutive rows x N channels, and a thread 8 channels of one run,
so a row's older taps are the thread's own earlier loads.

A tile that is not inside one sequence (see `locate_rows`) goes the slow way, through the ring.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_filters import (
    convolve,
    load_code,
    load_weights,
    load_window,
    locate_block,
    locate_rows,
)
from .triton_launch import start_next, wait_previous


@triton.jit(do_not_specialize=["count"])
def runs_kernel(
    x,
    x_stride,
    z,
    z_stride,
    up,
    static,
    bias,
    ring,
    ring_stride,
    residual,
    out,
    out_stride,
    positions,
    row_seq,
    starts,
    slots,
    ring_rows,
    count,
    SEGMENTS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    ADD: tl.constexpr,
    RING: tl.constexpr,
    J: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    G: tl.constexpr = 256 // N
    first_column, start, size, base, z_start = locate_block(tl.program_id(0), SEGMENTS, N)
    within = first_column - start + tl.arange(0, N)
    valid = within < size
    convolved = valid & (base + 0 * within >= 0)
    column = start + within
    channel = tl.maximum(base, 0) + within
    weights = load_weights(
        up, static, bias, channel, convolved, channel, convolved,
        D, W, R, KIND, GENERATE, BIAS, G, N,
    )  # fmt: skip
    _ups, taps, shift = weights
    wait_previous(PDL)
    meta = (positions, row_seq, starts, slots, ring_rows)
    first_row = tl.program_id(1) * (G * J)
    group = tl.arange(0, G)
    _keep, spot, _ring_row = locate_rows(
        first_row + group, first_row, count, meta, W, RING, "long", G * J
    )
    # Before the branch and the stores: no load is moved above one of them.
    line = x + (first_row + group * J)[:, None].to(tl.int64) * x_stride + column[None, :]
    inputs = ()
    for j in tl.static_range(W - 1 + J):
        at = line + (j - (W - 1)) * x_stride
        there = first_row + group * J + (j - (W - 1))
        there_mask = (there >= 0) & (there < count)
        inputs = inputs + (tl.load(at, mask=there_mask[:, None] & valid[None, :], other=0.0),)
    codes = ()
    for j in tl.static_range(J):
        row = first_row + group * J + j
        code = load_code(
            z, z_stride, row, (row < count) & (base + 0 * row >= 0), z_start,
            first_column - start, within, convolved, W, R, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
        codes = codes + (code,)
    if spot[0]:
        for i in range(J):
            slow_row = first_row + i * G
            tile_row = slow_row + tl.arange(0, G)
            keep = tile_row < count
            tile_code = load_code(
                z, z_stride, tile_row, keep & (base + 0 * tile_row >= 0), z_start,
                first_column - start, within, valid, W, R, HEAD, KIND, GENERATE, N,
            )  # fmt: skip
            _tile_keep, place, _tile_ring = locate_rows(
                tile_row, slow_row, count, meta, W, RING, "short", G
            )
            window = load_window(
                x, x_stride, ring, ring_stride, tile_row, slow_row, count, meta, place,
                column, channel, valid, convolved, W, RING, "short", G,
            )  # fmt: skip
            y = convolve(window, tile_code, weights, W, R, KIND, GENERATE, SCALE, SILU, G, N)
            _finish(
                y, window[0], residual, out, out_stride, tile_row, keep, column, valid, base, ADD
            )
    else:
        for j in tl.static_range(J):
            y = tl.broadcast_to(shift, (G, N))
            for w in tl.static_range(W):
                f = tl.broadcast_to(taps[w], (G, N))
                if KIND == "headwise":
                    f += codes[j][w].to(tl.float32)
                y += f * inputs[j + W - 1 - w].to(tl.float32)
            y *= SCALE
            if SILU:
                y *= tl.sigmoid(y)
            y_row = first_row + group * J + j
            _finish(
                y, inputs[j + W - 1], residual, out, out_stride, y_row, y_row < count, column,
                valid, base, ADD,
            )  # fmt: skip


@triton.jit
def _finish(y, now, residual, out, out_stride, row, keep, column, valid, base, ADD: tl.constexpr):
    """Stores a tile: `y`, or `now` where no stream covers it, plus the residual."""
    y = tl.where(base >= 0, y, now.to(tl.float32))
    place = row[:, None].to(tl.int64) * out_stride + column[None, :]
    inside = keep[:, None] & valid[None, :]
    if ADD:
        y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
