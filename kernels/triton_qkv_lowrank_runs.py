# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""q, k and v of long runs of rows with low-rank filters: `triton_lowrank_runs` for heads.

A program takes a whole head, two halves of N channels, and marches down a stretch of one sequence
as it does there; a row's angles are read once for the head. For heads that rotate whole, of a power
of two of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_heads import load_norms, locate_head, store_head, turn
from .triton_launch import start_next, wait_previous
from .triton_lowrank_runs import (
    RUN,
    code_order,
    filter_columns,
    filter_rows,
    load_codes,
    load_step,
    locate_stretch,
    ring_before,
    store_last,
)


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
    STEP: tl.constexpr = 8 * RUN
    head = tl.program_id(0)
    is_q, is_v, part_head, base, z_start, _before = locate_head(head, PARTS, Q_HEADS, KV_HEADS)
    low = tl.arange(0, N)
    high = N + low
    valid = low < N
    rank = tl.arange(0, 16)
    channel = (base + part_head * HEAD_DIM + low)[None, :]
    ups = ()
    taps = ()
    shifts = ()
    for half in tl.static_range(2):
        first_channel = base + part_head * HEAD_DIM + half * N
        for w in tl.static_range(W):
            order = up + (w * D + first_channel + filter_columns(N, WARPS))[None, :]
            mask = (rank < R)[:, None]
            ups = ups + (tl.load(order + rank[:, None] * (W * D), mask=mask, other=0.0),)
            taps = taps + (tl.load(static + w * D + channel + half * N),)
        if BIAS:
            shifts = shifts + (tl.load(bias + channel + half * N),)
        else:
            shifts = shifts + (tl.zeros((1, N), tl.float32),)
    norms = load_norms(norm_q, norm_k, is_q, low, high, valid, valid, NORM)
    wait_previous(PDL)
    pages = (k_pages, v_pages, k_page_stride, k_head_stride, v_page_stride, v_head_stride)
    stretch = locate_stretch(tl.program_id(1), offsets, starts, slots, seqs, SEQS, ROWS)
    first, stop, _begin, _end, _start, _slot = stretch
    row = first + tl.arange(0, 8) * RUN
    column = (head * HEAD_DIM + low)[None, :]
    line = x + row[:, None].to(tl.int64) * x_stride + column
    before_low = ring_before(ring, ring_stride, stretch, row, channel, W, RING)
    before_high = ring_before(ring, ring_stride, stretch, row, channel + N, W, RING)
    code_row = first + code_order()
    code = z + code_row[:, None].to(tl.int64) * z_stride + (z_start + rank)[None, :]
    angle = rope + row[:, None].to(tl.int64) * HEAD_DIM + low[None, :]
    for step in tl.range(0, stop - first, STEP, num_stages=STAGES):
        lows = load_step(line, x_stride, before_low, stretch, row + step, W)
        highs = load_step(line + N, x_stride, before_high, stretch, row + step, W)
        codes = load_codes(code, z_stride, code_row + step, stop, rank, R)
        angles = ()
        kv = ()
        for j in tl.static_range(RUN):
            here = row + (step + j)
            turned = (here < stop)[:, None] & (is_v == 0)
            angles = angles + (tl.load(angle + j * HEAD_DIM, mask=turned, other=0.0),)
            angles = angles + (tl.load(angle + (j * HEAD_DIM + N), mask=turned, other=0.0),)
            kv = kv + (tl.load(kv_rows + here, mask=(here < stop) & (is_q == 0), other=-1),)
        for p in tl.static_range(0, RUN, 2):
            even_low = tl.broadcast_to(shifts[0], (8, N))
            even_high = tl.broadcast_to(shifts[1], (8, N))
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
                # v does not turn, and has zeros for angles.
                cos = tl.where(is_v, 1.0, angles[2 * (p + i)])
                first_half, second_half = turn(
                    a, b, cos, angles[2 * (p + i) + 1], norms, is_v, valid, valid,
                    q_out.dtype.element_ty, HEAD_DIM, NORM, EPS,
                )  # fmt: skip
                here = row + (step + p + i)
                store_head(
                    first_half, second_half, here, here < stop, kv[p + i], low, high, valid, valid,
                    head, part_head, is_q, is_v, q_out, pages, Q_HEADS, HEAD_DIM, PAGE,
                )  # fmt: skip
        line += STEP * x_stride
        code += STEP * z_stride
        angle += STEP * HEAD_DIM
    for half in tl.static_range(2):
        store_last(
            x, x_stride, ring, ring_stride, ring_rows, stretch, column + half * N,
            channel + half * N, RING,
        )  # fmt: skip
