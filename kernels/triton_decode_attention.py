# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Paged attention of one query row that shares its keys with no other: decode without groups.

With one query there is nothing for matrix units to do. Every few lanes of a program keep a softmax
of their own over their own keys, in registers, and meet at the end: no exchange and no barrier
while keys are read. The next tiles are on their way while one is used, and the first ones before
the kernel before is done: all rows but the step's own were written by earlier steps.

Knows nothing of how a context is cut into parts beyond `context_part`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_launch import start_next, wait_previous

GRAIN = tl.constexpr(16)
"""Parts of a context begin at multiples of so many keys."""


@triton.jit
def context_part(start, split, WINDOW: tl.constexpr, SPLITS: tl.constexpr):
    """Split's part of the positions before `start` that its rows see -> (begin, stop, parts).

    There is at least one part, which may be empty.
    """
    first = tl.maximum(start - WINDOW + 1, 0) // GRAIN * GRAIN if WINDOW > 0 else 0
    length = tl.maximum((start - first + GRAIN * SPLITS - 1) // (GRAIN * SPLITS), 1) * GRAIN
    begin = first + split * length
    parts = tl.maximum((start - first + length - 1) // length, 1)
    return begin, tl.minimum(begin + length, start), parts


@triton.jit
def _find(pages, first, stop, PAGE: tl.constexpr):
    return tl.load(pages + first // PAGE, mask=first < stop, other=0).to(tl.int64)


@triton.jit
def _fetch(cache, page, first, stop, key, d, D: tl.constexpr, PAGE: tl.constexpr):
    """Keys and values at positions first + key, which lie in one page; zeros from `stop` on.

    cache: the head's keys and values and their page strides; first and page [G, 1], key [1, n],
    d [1, 1, DP] -> two tiles [G, n, DP].
    """
    k_head, v_head, k_page_stride, v_page_stride = cache
    inside = (first % PAGE * D)[:, :, None]
    beside = key[:, :, None] * D + d
    mask = (first + key < stop)[:, :, None] & (d < D)
    k_at = k_head + ((page * k_page_stride)[:, :, None] + inside + beside)
    v_at = v_head + ((page * v_page_stride)[:, :, None] + inside + beside)
    return tl.load(k_at, mask=mask, other=0.0), tl.load(v_at, mask=mask, other=0.0)


@triton.jit
def _meet(query, k, v, visible, total, peak, value):
    """One online-softmax update, base 2, of each of G groups by its n keys."""
    score = tl.sum(k.to(tl.float32) * query, axis=2)
    score = tl.where(visible, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, axis=1))
    # A group that has seen nothing yet: any finite base keeps its weights at zero.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(score - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(weight, axis=1)
    value = value * fade[:, None] + tl.sum(weight[:, :, None] * v.to(tl.float32), axis=1)
    return total, higher, value


@triton.jit
def decode_kernel(
    q,
    k_pages,
    v_pages,
    k_page_stride,
    k_head_stride,
    v_page_stride,
    v_head_stride,
    table,
    table_stride,
    starts,
    offsets,
    out,
    partial,
    partial_lse,
    scale,
    Q_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUPS: tl.constexpr,
    AHEAD: tl.constexpr,
    DP: tl.constexpr,
    PDL: tl.constexpr,
):
    """Sequences of one row. KEYS keys a group and turn, AHEAD turns fetched ahead."""
    start_next(PDL)
    split = tl.program_id(0)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    first_row = tl.load(offsets + seq)
    rows = tl.load(offsets + seq + 1) - first_row
    start = tl.load(starts + seq)
    begin, stop, parts = context_part(start, split, WINDOW, SPLITS)
    active = (rows == 1) & (split < parts)
    stop = tl.where(active, stop, begin)
    TURN: tl.constexpr = KEYS * GROUPS
    d = tl.arange(0, DP)[None, None, :]
    key = tl.arange(0, KEYS)[None, :]
    group = tl.arange(0, GROUPS)[:, None]
    k_head = k_pages + head.to(tl.int64) * k_head_stride
    v_head = v_pages + head.to(tl.int64) * v_head_stride
    cache = (k_head, v_head, k_page_stride, v_page_stride)
    pages = table + seq.to(tl.int64) * table_stride
    ks = ()
    vs = ()
    for i in tl.static_range(AHEAD):
        first = begin + i * TURN + group * KEYS
        k, v = _fetch(cache, _find(pages, first, stop, PAGE), first, stop, key, d, D, PAGE)
        ks = ks + (k,)
        vs = vs + (v,)
    page = _find(pages, begin + AHEAD * TURN + group * KEYS, stop, PAGE)
    # The step's own row: the last part's, and of its first group alone.
    new = start + group
    new_stop = tl.where(active & (split == parts - 1), start + 1, start)
    new_page = _find(pages, new, new_stop, PAGE)
    wait_previous(PDL)
    if active:
        # Spread over the groups, so that it has the layout of the keys: no exchange.
        line = (first_row.to(tl.int64) * Q_HEADS + head) * D
        at_q = q + line + tl.broadcast_to(d, (GROUPS, 1, DP))
        query = tl.load(at_q, mask=d < D, other=0.0).to(tl.float32) * scale
        one = tl.zeros((1, 1), tl.int32)
        new_k, new_v = _fetch(cache, new_page, new, new_stop, one, d, D, PAGE)
        total = tl.zeros((GROUPS,), tl.float32)
        peak = tl.full((GROUPS,), float("-inf"), tl.float32)
        value = tl.zeros((GROUPS, DP), tl.float32)
        for at in range(begin, stop, TURN):
            ahead = at + AHEAD * TURN + group * KEYS
            next_k, next_v = _fetch(cache, page, ahead, stop, key, d, D, PAGE)
            page = _find(pages, ahead + TURN, stop, PAGE)
            seen = at + group * KEYS + key
            visible = seen < stop
            if WINDOW > 0:
                visible &= seen > start - WINDOW
            total, peak, value = _meet(query, ks[0], vs[0], visible, total, peak, value)
            ks = ks[1:] + (next_k,)
            vs = vs[1:] + (next_v,)
        total, peak, value = _meet(query, new_k, new_v, new < new_stop, total, peak, value)
        top = tl.max(peak, axis=0)
        # A part may lie before the window: weightless, and not 0 / 0.
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(peak - base)
        whole = tl.sum(total * weight, axis=0)
        mean = tl.sum(value * weight[:, None], axis=0) / tl.where(whole == 0.0, 1.0, whole)
        column = tl.arange(0, DP)
        if SPLITS == 1:
            tl.store(out + line + column, mean.to(out.dtype.element_ty), mask=column < D)
        else:
            slot = (seq.to(tl.int64) * Q_HEADS + head) * SPLITS + split
            tl.store(partial + slot * D + column, mean, mask=column < D)
            lse = base + tl.log2(tl.where(whole == 0.0, 1.0, whole))
            tl.store(partial_lse + slot, tl.where(whole == 0.0, float("-inf"), lse))
