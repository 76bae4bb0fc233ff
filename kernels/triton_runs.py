# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""The convolution of long runs of rows: every input is loaded once and slides through registers.

A warp takes 256 / N runs of J consecutive rows x N channels, and a thread 8 channels of one run,
so a row's older taps are the thread's own earlier loads. Low-rank filters are made 16 rows at a
time with the rows of z in the order that puts every row's filter into the thread that applies it.

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
    padded_rank,
    swap_columns,
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
    TILE: tl.constexpr = 16 if KIND == "lowrank" else G
    first_column, start, size, base, z_start = locate_block(tl.program_id(0), SEGMENTS, N)
    within = first_column - start + tl.arange(0, N)
    valid = within < size
    convolved = valid & (base + 0 * within >= 0)
    column = start + within
    channel = tl.maximum(base, 0) + within
    order = channel
    order_keep = convolved
    if KIND == "lowrank":
        swapped = first_column - start + swap_columns(N)
        order = tl.maximum(base, 0) + swapped
        order_keep = (swapped < size) & (base + 0 * within >= 0)
    weights = load_weights(
        up, static, bias, channel, convolved, order, order_keep,
        D, W, R, KIND, GENERATE, BIAS, TILE, N,
    )  # fmt: skip
    ups, taps, shift = weights
    wait_previous(PDL)
    meta = (positions, row_seq, starts, slots, ring_rows)
    first_row = tl.program_id(1) * (G * J)
    group = tl.arange(0, G)
    _keep, spot, _ring_row = locate_rows(
        first_row + group, first_row, count, meta, W, RING, "long", G * J
    )
    # Before the branch, stores and matrix products: no load is moved above one of them.
    line = x + (first_row + group * J)[:, None].to(tl.int64) * x_stride + column[None, :]
    inputs = ()
    for j in tl.static_range(W - 1 + J):
        at = line + (j - (W - 1)) * x_stride
        there = first_row + group * J + (j - (W - 1))
        there_mask = (there >= 0) & (there < count)
        inputs = inputs + (tl.load(at, mask=there_mask[:, None] & valid[None, :], other=0.0),)
    codes = ()
    if KIND == "lowrank":
        m = tl.arange(0, 16)
        rank = tl.arange(0, padded_rank(R))
        code_row = first_row + (m % G) * J + m // G
        code_rank = ((rank < R) & (base + 0 * rank >= 0))[None, :]
        code_at = z + code_row[:, None].to(tl.int64) * z_stride + z_start + rank[None, :]
        for pair in tl.static_range(J // 2):
            code_mask = code_rank & (code_row + pair * 2 < count)[:, None]
            codes = codes + (tl.load(code_at + pair * 2 * z_stride, mask=code_mask, other=0.0),)
    else:
        for j in tl.static_range(J):
            row = first_row + group * J + j
            code = load_code(
                z, z_stride, row, (row < count) & (base + 0 * row >= 0), z_start,
                first_column - start, within, convolved, W, R, HEAD, KIND, GENERATE, N,
            )  # fmt: skip
            codes = codes + (code,)
    if spot[0]:
        for i in range(G * J // TILE):
            slow_row = first_row + i * TILE
            tile_row = slow_row + tl.arange(0, TILE)
            keep = tile_row < count
            tile_code = load_code(
                z, z_stride, tile_row, keep & (base + 0 * tile_row >= 0), z_start,
                first_column - start, within, valid, W, R, HEAD, KIND, GENERATE, N,
            )  # fmt: skip
            _tile_keep, place, _tile_ring = locate_rows(
                tile_row, slow_row, count, meta, W, RING, "short", TILE
            )
            window = load_window(
                x, x_stride, ring, ring_stride, tile_row, slow_row, count, meta, place,
                column, channel, valid, convolved, W, RING, "short", TILE,
            )  # fmt: skip
            y = convolve(window, tile_code, weights, W, R, KIND, GENERATE, SCALE, SILU, TILE, N)
            _finish(
                y, window[0], residual, out, out_stride, tile_row, keep, column, valid, base, ADD
            )
    else:
        for pair in tl.static_range(J // 2):
            if KIND == "lowrank":
                even = ()
                odd = ()
                for w in tl.static_range(W):
                    f = tl.broadcast_to(taps[w], (16, N))
                    f = tl.dot(codes[pair], ups[w], acc=f, input_precision="ieee")
                    first, second = _two_rows(f, G, N)
                    even = even + (first,)
                    odd = odd + (second,)
                filters = (even, odd)
            else:
                filters = (
                    _row_filters(codes[pair * 2], taps, W, KIND, G, N),
                    _row_filters(codes[pair * 2 + 1], taps, W, KIND, G, N),
                )
            for odd_row in tl.static_range(2):
                y = tl.broadcast_to(shift, (G, N))
                for w in tl.static_range(W):
                    value = inputs[pair * 2 + odd_row + W - 1 - w]
                    y += filters[odd_row][w] * value.to(tl.float32)
                y *= SCALE
                if SILU:
                    y *= tl.sigmoid(y)
                y_row = first_row + group * J + pair * 2 + odd_row
                now = inputs[pair * 2 + odd_row + W - 1]
                _finish(
                    y,
                    now,
                    residual,
                    out,
                    out_stride,
                    y_row,
                    y_row < count,
                    column,
                    valid,
                    base,
                    ADD,
                )


@triton.jit
def _two_rows(f, G: tl.constexpr, N: tl.constexpr):
    """An accumulator [2 G, N] in swapped order -> rows 0 .. G and the others, in plain order.

    Moves no data between threads: each holds both rows.
    """
    tl.static_assert(G == 8)
    f = tl.reshape(f, (2, G, 4, 4, 2))
    f = tl.permute(f, (1, 3, 2, 4, 0))
    first, second = tl.split(f)
    return tl.reshape(first, (G, N)), tl.reshape(second, (G, N))


@triton.jit
def _row_filters(code, taps, W: tl.constexpr, KIND: tl.constexpr, G: tl.constexpr, N: tl.constexpr):
    """Head-wise or static filters of G rows: W tiles [G, N]."""
    filters = ()
    for w in tl.static_range(W):
        f = tl.broadcast_to(taps[w], (G, N))
        if KIND == "headwise":
            f += code[w].to(tl.float32)
        filters = filters + (f,)
    return filters


@triton.jit
def _finish(y, now, residual, out, out_stride, row, keep, column, valid, base, ADD: tl.constexpr):
    """Stores a tile: `y`, or `now` where no stream covers it, plus the residual."""
    y = tl.where(base >= 0, y, now.to(tl.float32))
    place = row[:, None].to(tl.int64) * out_stride + column[None, :]
    inside = keep[:, None] & valid[None, :]
    if ADD:
        y += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
