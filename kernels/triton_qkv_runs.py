# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""q, k and v of long runs of rows with static or head-wise filters: `triton_runs` for heads.

A warp takes one stretch of ROWS rows of one head in 256 / N spans, and a thread 8 channels of each
half of one span. For heads that rotate whole, of a power of two of channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_filters import convolve, load_weights
from .triton_heads import load_norms, locate_head, store_head, turn
from .triton_launch import start_next, wait_previous
from .triton_runs import load_taps
from .triton_stretches import load_older, locate_stretch, store_last


@triton.jit(do_not_specialize=["seqs"])
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
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    RING: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    tl.static_assert(HEAD_DIM == 2 * N)
    G: tl.constexpr = 256 // N
    J: tl.constexpr = ROWS // G
    tl.static_assert(J * G == ROWS and ROWS >= W - 1)
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
    stretch = locate_stretch(tl.program_id(1), offsets, starts, slots, seqs, SEQS, ROWS)
    wait_previous(PDL)
    first, stop, _begin, _end, _start, _slot = stretch
    pages = (k_pages, v_pages, k_page_stride, k_head_stride, v_page_stride, v_head_stride)
    within = before + part_head * HEAD_DIM
    column = head * HEAD_DIM
    row = first + tl.arange(0, G) * J
    line = x + row[:, None].to(tl.int64) * x_stride + (column + low)[None, :]
    lows = load_older(
        line, x_stride, ring, ring_stride, stretch, row[:, None], channel + low[None, :],
        convolved[None, :], W, RING,
    )  # fmt: skip
    highs = load_older(
        line + N, x_stride, ring, ring_stride, stretch, row[:, None], channel + high[None, :],
        convolved[None, :], W, RING,
    )  # fmt: skip
    for j in tl.static_range(J):
        inside = (row + j < stop)[:, None]
        lows = lows + (tl.load(line + j * x_stride, mask=inside, other=0.0),)
        highs = highs + (tl.load(line + (j * x_stride + N), mask=inside, other=0.0),)
    results = ()
    for j in tl.static_range(J):
        here = row + j
        use = (here < stop) & (base + 0 * row >= 0)
        low_code = load_taps(
            z, z_stride, here, use, z_start, within, within + low, valid,
            W, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
        high_code = load_taps(
            z, z_stride, here, use, z_start, within + N, within + high, valid,
            W, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
        low_window = ()
        high_window = ()
        for w in tl.static_range(W):
            low_window = low_window + (lows[j + W - 1 - w],)
            high_window = high_window + (highs[j + W - 1 - w],)
        a = convolve(low_window, low_code, low_weights, W, 0, KIND, GENERATE, SCALE, SILU, G, N)
        b = convolve(high_window, high_code, high_weights, W, 0, KIND, GENERATE, SCALE, SILU, G, N)
        a = tl.where(base >= 0, a, low_window[0].to(tl.float32))
        b = tl.where(base >= 0, b, high_window[0].to(tl.float32))
        angle = rope + here[:, None].to(tl.int64) * HEAD_DIM + low[None, :]
        turned = ((here < stop) & ((is_v + 0 * row) == 0))[:, None]
        cos = tl.load(angle, mask=turned, other=1.0)
        sin = tl.load(angle + N, mask=turned, other=0.0)
        pair = turn(
            a, b, cos, sin, norms, is_v, valid, valid, q_out.dtype.element_ty, HEAD_DIM, NORM, EPS
        )
        results = results + (pair,)
    # After the loads of all rows: none is moved above a store.
    for j in tl.static_range(J):
        here = row + j
        keep = here < stop
        kv_row = tl.load(kv_rows + here, mask=keep, other=-1)
        store_head(
            results[j][0], results[j][1], here, keep, kv_row, low, high, valid, valid, head,
            part_head, is_q, is_v, q_out, pages, Q_HEADS, HEAD_DIM, PAGE,
        )  # fmt: skip
    both = tl.arange(0, HEAD_DIM)
    store_last(
        x, x_stride, ring, ring_stride, ring_rows, stretch, column + both, channel + both,
        base + 0 * both >= 0, RING,
    )  # fmt: skip
