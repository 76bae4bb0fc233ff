# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false
"""q, k and v of long runs of rows with low-rank filters: `triton_lowrank_runs` for heads.

A program takes a whole head, two halves of N channels, and marches down a stretch of one sequence
as it does there; a row's angles are read once for the head. For heads that rotate whole, of a power
of two of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_heads import load_norms, locate_head
from .triton_launch import start_next, wait_previous
from .triton_lowrank_runs import (
    RUN,
    code_rows,
    filter_columns,
    filter_rows,
    last_rows,
    load_codes,
    load_rows,
    span_rows,
    tile_channels,
)
from .triton_stretches import load_older, locate_stretch, store_last


@triton.jit(do_not_specialize=["seqs"])
def qkv_lowrank_runs_kernel(
    x,
    x_stride,
    z,
    z_stride,
    up,
    static,
    bias,
    ring,
    ring_stride,
    norm_q,
    norm_k,
    rope,
    q_out,
    k_pages,
    v_pages,
    k_page_stride,
    k_head_stride,
    v_page_stride,
    v_head_stride,
    offsets,
    starts,
    slots,
    ring_rows,
    kv_rows,
    seqs,
    PARTS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    RING: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    tl.static_assert(HEAD_DIM == 2 * N)
    head = tl.program_id(0)
    is_q, is_v, part_head, base, z_start, _before = locate_head(head, PARTS, Q_HEADS, KV_HEADS)
    column = head * HEAD_DIM
    channel = base + part_head * HEAD_DIM
    rank = tl.arange(0, 16)
    flat = tl.arange(0, N)
    lane = tile_channels(N, WARPS)
    ups = ()
    taps = ()
    shifts = ()
    for half in tl.static_range(2):
        start_channel = channel + half * N
        for w in tl.static_range(W):
            order = up + (w * D + start_channel + filter_columns(N, WARPS))[None, :]
            mask = (rank < R)[:, None]
            ups = ups + (tl.load(order + rank[:, None] * (W * D), mask=mask, other=0.0),)
            taps = taps + (tl.load(static + w * D + start_channel + lane),)
        if BIAS:
            shifts = shifts + (tl.load(bias + start_channel + lane),)
        else:
            shifts = shifts + (tl.zeros((1, WARPS, N // WARPS), tl.float32),)
    norms = load_norms(norm_q, norm_k, is_q, lane, N + lane, lane < N, lane < N, NORM)
    stretch = locate_stretch(tl.program_id(1), offsets, starts, slots, seqs, SEQS, ROWS)
    wait_previous(PDL)
    first, stop, _begin, _end, _start, _slot = stretch
    span, row = span_rows(first, stop)
    tall = row[:, None, None]
    here = x + tall.to(tl.int64) * x_stride + (column + lane)
    old_low = load_older(
        here, x_stride, ring, ring_stride, stretch, tall, channel + lane, lane < N, W, RING
    )
    old_high = load_older(
        here + N, x_stride, ring, ring_stride, stretch, tall, channel + N + lane, lane < N, W, RING
    )
    line = x + row[:, None].to(tl.int64) * x_stride + (column + flat)[None, :]
    code_row = code_rows(first, span)
    code = z + code_row[:, None].to(tl.int64) * z_stride + (z_start + rank)[None, :]
    angle = rope + row[:, None].to(tl.int64) * HEAD_DIM + flat[None, :]
    page_stride = tl.where(is_v, v_page_stride, k_page_stride)
    target = tl.where(
        is_v, v_pages + part_head * v_head_stride, k_pages + part_head * k_head_stride
    )
    target = tl.where(is_q, q_out + column, target)
    for step in tl.range(0, span, RUN, num_stages=STAGES):
        lows = load_rows(line, x_stride, old_low, row + step, stop, N, WARPS)
        highs = load_rows(line + N, x_stride, old_high, row + step, stop, N, WARPS)
        codes = load_codes(code, z_stride, code_row + step, stop, rank, R)
        angles = ()
        kv = ()
        for j in tl.static_range(RUN):
            live = row + (step + j) < stop
            turned = live[:, None] & (is_v == 0)
            for half in tl.static_range(2):
                part = tl.load(angle + (j * HEAD_DIM + half * N), mask=turned, other=0.0)
                angles = angles + (tl.reshape(part, (8, WARPS, N // WARPS)),)
            kv = kv + (tl.load(kv_rows + row + (step + j), mask=live & (is_q == 0), other=-1),)
        for p in tl.static_range(0, RUN, 2):
            even_low = tl.broadcast_to(shifts[0], (8, WARPS, N // WARPS))
            even_high = tl.broadcast_to(shifts[1], (8, WARPS, N // WARPS))
            odd_low = even_low
            odd_high = even_high
            for w in tl.static_range(W):
                f_even, f_odd = filter_rows(codes[p // 2], ups[w], taps[w], N, WARPS)
                even_low += f_even * lows[p + W - 1 - w].to(tl.float32)
                odd_low += f_odd * lows[p + W - w].to(tl.float32)
                f_even, f_odd = filter_rows(codes[p // 2], ups[W + w], taps[W + w], N, WARPS)
                even_high += f_even * highs[p + W - 1 - w].to(tl.float32)
                odd_high += f_odd * highs[p + W - w].to(tl.float32)
            for i in tl.static_range(2):
                a = (even_low if i == 0 else odd_low) * SCALE
                b = (even_high if i == 0 else odd_high) * SCALE
                if SILU:
                    a *= tl.sigmoid(a)
                    b *= tl.sigmoid(b)
                if NORM:
                    # Of two axes: Triton 3.6 sums one wrongly whose lanes are not neighbours.
                    squares = tl.sum(tl.reshape(a * a + b * b, (8, N)), axis=1)
                    inverse = tl.rsqrt(squares / HEAD_DIM + EPS)[:, None, None]
                    a = tl.where(is_v, a, a * inverse * norms[0])
                    b = tl.where(is_v, b, b * inverse * norms[1])
                # v does not turn, and has zeros for angles.
                cos = tl.where(is_v, 1.0, angles[2 * (p + i)])
                sin = angles[2 * (p + i) + 1]
                spot = row + (step + p + i)
                # Unsigned, division by a page size is a shift.
                slot = kv[p + i].to(tl.uint32)
                inside = (slot % PAGE).to(tl.int32) * HEAD_DIM
                place = (slot // PAGE).to(tl.int64) * page_stride + inside
                place = tl.where(is_q, spot.to(tl.int64) * (Q_HEADS * HEAD_DIM), place)
                kept = tl.where(is_q, spot < stop, kv[p + i] >= 0)[:, None, None]
                at = target + place[:, None, None] + lane
                tl.store(at, (a * cos - b * sin).to(q_out.dtype.element_ty), mask=kept)
                tl.store(at + N, (b * cos + a * sin).to(q_out.dtype.element_ty), mask=kept)
        old_low = last_rows(lows, W)
        old_high = last_rows(highs, W)
        line += RUN * x_stride
        code += RUN * z_stride
        angle += RUN * HEAD_DIM
    both = tl.arange(0, HEAD_DIM)
    store_last(
        x, x_stride, ring, ring_stride, ring_rows, stretch, column + both, channel + both,
        both < HEAD_DIM, RING,
    )  # fmt: skip
