# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""q, k and v of long runs of rows with static or head-wise filters: `triton_runs` for heads.

A warp takes 256 / N runs of J consecutive rows of one head, a thread 8 channels of each half of
one run, so that a row's older taps are the thread's own earlier loads. For heads that rotate whole,
of a power of two of channels; a tile that is not inside one sequence goes the slow way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_filters import convolve, load_code, load_weights, load_window, locate_rows
from .triton_heads import load_norms, locate_head, store_head, turn
from .triton_launch import start_next, wait_previous


@triton.jit(do_not_specialize=["count"])
def qkv_runs_kernel(
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
    positions,
    row_seq,
    starts,
    slots,
    ring_rows,
    kv_rows,
    count,
    PARTS: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    RING: tl.constexpr,
    J: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    tl.static_assert(HEAD_DIM == 2 * N)
    G: tl.constexpr = 256 // N
    head = tl.program_id(0)
    is_q, is_v, part_head, base, z_start, before = locate_head(head, PARTS, Q_HEADS, KV_HEADS)
    low = tl.arange(0, N)
    high = N + low
    valid = low < N
    convolved = valid & (base + 0 * low >= 0)
    channel = tl.maximum(base, 0) + part_head * HEAD_DIM
    low_weights = load_weights(
        up, static, bias, channel + low, convolved, channel + low, convolved,
        D, W, 0, KIND, GENERATE, BIAS, G, N,
    )  # fmt: skip
    high_weights = load_weights(
        up, static, bias, channel + high, convolved, channel + high, convolved,
        D, W, 0, KIND, GENERATE, BIAS, G, N,
    )  # fmt: skip
    norms = load_norms(norm_q, norm_k, is_q, low, high, valid, valid, NORM)
    wait_previous(PDL)
    pages = (k_pages, v_pages, k_page_stride, k_head_stride, v_page_stride, v_head_stride)
    meta = (positions, row_seq, starts, slots, ring_rows)
    within = before + part_head * HEAD_DIM
    column = head * HEAD_DIM
    first_row = tl.program_id(1) * (G * J)
    group = tl.arange(0, G)
    _keep, spot, _ring_row = locate_rows(
        first_row + group, first_row, count, meta, W, RING, "long", G * J
    )
    # Before the branch and the stores: no load is moved above one of them.
    line = x + (first_row + group * J)[:, None].to(tl.int64) * x_stride + column
    lows = ()
    highs = ()
    for j in tl.static_range(W - 1 + J):
        there = first_row + group * J + (j - (W - 1))
        mask = ((there >= 0) & (there < count))[:, None]
        at = line + (j - (W - 1)) * x_stride
        lows = lows + (tl.load(at + low[None, :], mask=mask, other=0.0),)
        highs = highs + (tl.load(at + high[None, :], mask=mask, other=0.0),)
    if spot[0]:
        for i in range(J):
            slow_row = first_row + i * G
            row = slow_row + group
            keep, place, _ring = locate_rows(row, slow_row, count, meta, W, RING, "short", G)
            tiles = ()
            for half in tl.static_range(2):
                lane = half * N + low
                window = load_window(
                    x, x_stride, ring, ring_stride, row, slow_row, count, meta, place,
                    column + lane, channel + lane, valid, convolved, W, RING, "short", G,
                )  # fmt: skip
                code = load_code(
                    z, z_stride, row, keep & (base + 0 * row >= 0), z_start, within + half * N,
                    within + lane, valid, W, 0, HEAD, KIND, GENERATE, N,
                )  # fmt: skip
                if half == 0:
                    y = convolve(window, code, low_weights, W, 0, KIND, GENERATE, SCALE, SILU, G, N)
                else:
                    y = convolve(
                        window, code, high_weights, W, 0, KIND, GENERATE, SCALE, SILU, G, N
                    )
                tiles = tiles + (tl.where(base >= 0, y, window[0].to(tl.float32)),)
            cos, sin = _angles(rope, row, keep, low, is_v, HEAD_DIM)
            first, second = turn(
                tiles[0], tiles[1], cos, sin, norms, is_v, valid, valid,
                q_out.dtype.element_ty, HEAD_DIM, NORM, EPS,
            )  # fmt: skip
            kv_row = tl.load(kv_rows + row, mask=keep, other=-1)
            store_head(
                first, second, row, keep, kv_row, low, high, valid, valid, head, part_head,
                is_q, is_v, q_out, pages, Q_HEADS, HEAD_DIM, PAGE,
            )  # fmt: skip
    else:
        results = ()
        for j in tl.static_range(J):
            row = first_row + group * J + j
            use = (row < count) & (base + 0 * row >= 0)
            low_code = load_code(
                z, z_stride, row, use, z_start, within, within + low, valid,
                W, 0, HEAD, KIND, GENERATE, N,
            )  # fmt: skip
            high_code = load_code(
                z, z_stride, row, use, z_start, within + N, within + high, valid,
                W, 0, HEAD, KIND, GENERATE, N,
            )  # fmt: skip
            low_window = ()
            high_window = ()
            for w in tl.static_range(W):
                low_window = low_window + (lows[j + W - 1 - w],)
                high_window = high_window + (highs[j + W - 1 - w],)
            a = convolve(low_window, low_code, low_weights, W, 0, KIND, GENERATE, SCALE, SILU, G, N)
            b = convolve(
                high_window, high_code, high_weights, W, 0, KIND, GENERATE, SCALE, SILU, G, N
            )
            a = tl.where(base >= 0, a, low_window[0].to(tl.float32))
            b = tl.where(base >= 0, b, high_window[0].to(tl.float32))
            cos, sin = _angles(rope, row, row < count, low, is_v, HEAD_DIM)
            pair = turn(
                a, b, cos, sin, norms, is_v, valid, valid,
                q_out.dtype.element_ty, HEAD_DIM, NORM, EPS,
            )  # fmt: skip
            results = results + (pair,)
        for j in tl.static_range(J):
            row = first_row + group * J + j
            keep = row < count
            kv_row = tl.load(kv_rows + row, mask=keep, other=-1)
            store_head(
                results[j][0], results[j][1], row, keep, kv_row, low, high, valid, valid, head,
                part_head, is_q, is_v, q_out, pages, Q_HEADS, HEAD_DIM, PAGE,
            )  # fmt: skip


@triton.jit
def _angles(rope, row, keep, low, is_v, HEAD_DIM: tl.constexpr):
    """Cosines and sines of rows, 1 and 0 for v."""
    angle = rope + row[:, None].to(tl.int64) * HEAD_DIM + low[None, :]
    mask = (keep & ((is_v + 0 * row) == 0))[:, None]
    cos = tl.load(angle, mask=mask, other=1.0)
    sin = tl.load(angle + HEAD_DIM // 2, mask=mask, other=0.0)
    return cos, sin
