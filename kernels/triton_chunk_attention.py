# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Paged attention for long runs of rows: a tile of query rows against all the keys they see.

Also the tile step (load keys and values through the page table, one online-softmax update) that
the split kernel shares. Knows nothing of batches beyond their row ranges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from . import tuning
from .triton_launch import overlapped, stages_that_fit, start_next, wait_previous

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import FlatBatch

LOG2_E = 1.4426950408889634


@triton.jit
def find_pages(pages, seen, stop, PAGE: tl.constexpr):
    """The pages of positions `seen` [N]; page 0 from `stop` on.

    Looked up a tile ahead, so that addresses of keys do not wait for them.
    """
    return tl.load(pages + seen // PAGE, mask=seen < stop, other=0).to(tl.int64)


@triton.jit
def load_keys(
    k_head,
    v_head,
    k_page_stride,
    v_page_stride,
    page,
    seen,
    stop,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    DP: tl.constexpr,
    MASK: tl.constexpr,
):
    """Keys and values at positions `seen` [N] of their pages [N] -> two tiles [N, DP].

    MASK: some positions may be past `stop`; they give zeros. Pages may hold anything there, NaN
    too.
    """
    d = tl.arange(0, DP)
    inside = ((seen % PAGE) * D)[:, None] + d[None, :]
    k_at = k_head + (page * k_page_stride)[:, None] + inside
    v_at = v_head + (page * v_page_stride)[:, None] + inside
    if MASK:
        mask = (seen < stop)[:, None] & (d < D)[None, :]
        k = tl.load(k_at, mask=mask, other=0.0)
        v = tl.load(v_at, mask=mask, other=0.0)
    elif D < DP:
        k = tl.load(k_at, mask=(d < D)[None, :], other=0.0)
        v = tl.load(v_at, mask=(d < D)[None, :], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    return k, v


@triton.jit
def attend(
    queries,
    k,
    v,
    position,
    seen,
    stop,
    scale,
    total,
    peak,
    value,
    WINDOW: tl.constexpr,
    MASK: tl.constexpr,
):
    """One online-softmax update, base 2 -> (total, peak, value).

    MASK: some of the keys may be out of a row's sight.
    """
    score = tl.dot(queries, tl.trans(k), input_precision="ieee")
    if MASK:
        visible = (seen[None, :] <= position[:, None]) & (seen < stop)[None, :]
        if WINDOW > 0:
            visible &= seen[None, :] > position[:, None] - WINDOW
        score = tl.where(visible, score * scale, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        # A row that has seen nothing yet: any finite base keeps its weights at zero.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
    else:
        # The scale is positive, so the largest product is the largest score.
        higher = tl.maximum(peak, tl.max(score, axis=1) * scale)
        base = higher
        weight = tl.exp2(score * scale - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(weight, axis=1)
    value = tl.dot(weight.to(v.dtype), v, acc=value * fade[:, None], input_precision="ieee")
    return total, higher, value


@triton.jit
def _chunk_kernel(
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
    scale,
    Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    ABOVE: tl.constexpr,
    ALIKE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_previous(PDL)
    # The last tiles of all heads first: they see the most keys.
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = tl.program_id(2)
    first_row = tl.load(offsets + seq)
    rows = tl.load(offsets + seq + 1) - first_row
    if (rows > ABOVE) & (tile * M < rows):
        start = tl.load(starts + seq)
        m = tile * M + tl.arange(0, M)
        d = tl.arange(0, DP)
        place = ((first_row + m).to(tl.int64) * Q_HEADS + head)[:, None] * D + d[None, :]
        mask = (m < rows)[:, None] & (d < D)[None, :]
        queries = tl.load(q + place, mask=mask, other=0.0)
        position = start + m
        total = tl.zeros((M,), tl.float32)
        peak = tl.full((M,), float("-inf"), tl.float32)
        value = tl.zeros((M, DP), tl.float32)
        kv_head = (head // GROUP).to(tl.int64)
        k_head = k_pages + kv_head * k_head_stride
        v_head = v_pages + kv_head * v_head_stride
        pages = table + seq.to(tl.int64) * table_stride

        top = start + tile * M
        stop = start + tl.minimum(tile * M + M, rows)
        begin = 0
        full = 0
        if WINDOW > 0:
            begin = tl.maximum(top - WINDOW + 1, 0) // N * N
            full = begin
        else:
            # Tiles of keys that every row sees need no mask.
            full = 0 if ALIKE else (top + 1) // N * N
        page = find_pages(pages, begin + tl.arange(0, N), stop, PAGE)
        for at in range(begin, full, N):
            seen = at + tl.arange(0, N)
            k, v = load_keys(
                k_head, v_head, k_page_stride, v_page_stride, page, seen, stop, D, PAGE, DP, False
            )
            page = find_pages(pages, seen + N, stop, PAGE)
            total, peak, value = attend(
                queries, k, v, position, seen, stop, scale, total, peak, value, WINDOW, False
            )
        for at in range(full, stop, N):
            seen = at + tl.arange(0, N)
            k, v = load_keys(
                k_head, v_head, k_page_stride, v_page_stride, page, seen, stop, D, PAGE, DP, True
            )
            page = find_pages(pages, seen + N, stop, PAGE)
            total, peak, value = attend(
                queries, k, v, position, seen, stop, scale, total, peak, value, WINDOW, True
            )
        # Rows past the run's end may have seen no key: not 0 / 0.
        value = value / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def chunk(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: FlatBatch,
    scale: float,
    window: int | None,
    out: Tensor,
    above: int,
    tile: tuning.ChunkTile | None = None,
    *,
    alike: bool = False,
) -> None:
    """Attention of all sequences with more than `above` rows, written to out [T, Hq * d].

    `alike`: every tile of keys is met by the same code. Without masks, where there need be none,
    a compiler fuses other multiplications and additions, and which tiles those are depends on where
    a prompt was cut.
    """
    _, q_heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    tile = tile or tuning.chunk_tile(q.element_size(), head_dim)
    padded = max(16, triton.next_power_of_2(head_dim))
    row_bytes = padded * q.element_size()
    stages = stages_that_fit(tile.stages, 2 * tile.keys * row_bytes, q, tile.rows * row_bytes)
    grid = (q_heads, triton.cdiv(batch.max_rows, tile.rows), len(batch.starts))
    _chunk_kernel[grid](
        q, k_pages, v_pages, k_pages.stride(0), k_pages.stride(1), v_pages.stride(0),
        v_pages.stride(1), batch.pages, batch.pages.stride(0), batch.starts, batch.offsets,
        out, scale * LOG2_E, Q_HEADS=q_heads, GROUP=q_heads // kv_heads, D=head_dim,
        PAGE=page_size, WINDOW=window or 0, ABOVE=above, ALIKE=alike, M=tile.rows, N=tile.keys,
        DP=padded, num_warps=tile.warps, num_stages=max(stages, 1),
        **overlapped(q),
    )  # fmt: skip
