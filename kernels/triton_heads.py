# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""What kernels over heads of q, k and v share: a head's place, its norm and rotation, its store.

A tile is some rows x one head, held as two halves [M, N]: the channels that RoPE turns against
each other meet in one thread. Channels past the rotary ones ride along as pairs with angle zero.

Knows nothing of convolutions; pages are [pages, kv heads, page_size, head_dim].
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def halves(pair, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    """The two channels of a head that a pair is made of."""
    TURN: tl.constexpr = ROTARY // 2
    if ROTARY == HEAD_DIM:
        low = pair
        high = pair + TURN
    else:
        rest: tl.constexpr = (HEAD_DIM - ROTARY + 1) // 2
        low = tl.where(pair < TURN, pair, ROTARY + pair - TURN)
        high = low + tl.where(pair < TURN, TURN, rest)
    return low, high


@triton.jit
def locate_head(head, PARTS: tl.constexpr, Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr):
    """-> (is it of q, is it of v, its number in its part; of the part: its covered channel or -1,
    z column, and channels of its stream before it)."""
    is_q = head < Q_HEADS
    is_v = head >= Q_HEADS + KV_HEADS
    base = tl.where(is_q, PARTS[0][0], tl.where(is_v, PARTS[2][0], PARTS[1][0]))
    z_start = tl.where(is_q, PARTS[0][1], tl.where(is_v, PARTS[2][1], PARTS[1][1]))
    before = tl.where(is_q, PARTS[0][2], tl.where(is_v, PARTS[2][2], PARTS[1][2]))
    part_head = head - tl.where(is_q, 0, tl.where(is_v, Q_HEADS + KV_HEADS, Q_HEADS))
    return is_q, is_v, part_head, base, z_start, before


@triton.jit
def load_norms(norm_q, norm_k, is_q, low, high, low_valid, high_valid, NORM: tl.constexpr):
    """Weights of the halves for `turn`; anything if there is no norm."""
    low_norm = low
    high_norm = high
    if NORM:
        weight = tl.where(is_q, norm_q, norm_k)
        low_norm = tl.load(weight + low, mask=low_valid, other=0.0).to(tl.float32)
        high_norm = tl.load(weight + high, mask=high_valid, other=0.0).to(tl.float32)
    return low_norm, high_norm


@triton.jit
def turn(
    a,
    b,
    cos,
    sin,
    norms,
    is_v,
    low_valid,
    high_valid,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
):
    """RMSNorm over the head (not of v) and rotation of its halves -> two tiles in `dtype`."""
    if NORM:
        # Lanes without a channel hold zero when the convolution has no bias there: mask them.
        squares = tl.where(low_valid[None, :], a * a, 0.0)
        squares += tl.where(high_valid[None, :], b * b, 0.0)
        inverse = tl.rsqrt(tl.sum(squares, axis=1) / HEAD_DIM + EPS)[:, None]
        a = tl.where(is_v, a, a * inverse * norms[0][None, :])
        b = tl.where(is_v, b, b * inverse * norms[1][None, :])
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def store_head(
    first,
    second,
    row,
    keep,
    kv_row,
    low,
    high,
    low_valid,
    high_valid,
    head,
    part_head,
    is_q,
    is_v,
    q_out,
    pages,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Stores halves of rows to q, or to their places in the pages of k or v."""
    k_pages, v_pages, k_page_stride, k_head_stride, v_page_stride, v_head_stride = pages
    if is_q:
        target = q_out + row[:, None].to(tl.int64) * (Q_HEADS * HEAD_DIM) + head * HEAD_DIM
        written = keep
    else:
        written = kv_row >= 0
        # Unsigned, division by a page size is a shift.
        slot = kv_row.to(tl.uint32)
        page = (slot // PAGE).to(tl.int64)
        inside = (slot % PAGE).to(tl.int32) * HEAD_DIM
        if is_v:
            place = page * v_page_stride + part_head * v_head_stride + inside
            target = v_pages + place[:, None]
        else:
            place = page * k_page_stride + part_head * k_head_stride + inside
            target = k_pages + place[:, None]
    tl.store(target + low[None, :], first, mask=written[:, None] & low_valid[None, :])
    tl.store(target + high[None, :], second, mask=written[:, None] & high_valid[None, :])
