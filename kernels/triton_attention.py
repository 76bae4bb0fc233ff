# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Paged attention: split-KV for short runs, and the choice between it and the chunk kernel.

One program takes one kv head of one sequence over one part of its context, with all query rows
and all query heads of the group as one tile, so each key and value is read once; a single query
goes to `triton_decode_attention`. The number of parts is fixed by shapes (a captured graph cannot
know lengths); how long a part is, each sequence works out on the device. Partial results are
combined in a fixed order: results repeat bitwise.

Batch metadata is read before the kernel before is done: no kernel writes it, a step's upload does.

Knows nothing of how pages were filled; pages are [pages, kv heads, page_size, head_dim].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_chunk_attention, tuning
from .triton_chunk_attention import attend, find_pages, load_keys
from .triton_decode_attention import context_part, decode_kernel
from .triton_launch import overlapped, start_next, wait_previous

if TYPE_CHECKING:
    from .batch import FlatBatch

LOG2_E = 1.4426950408889634


@triton.jit
def _split_kernel(
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
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    DP: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """EARLY: the first keys of earlier steps are fetched before the kernel before is done, and kept
    in registers until the others have been met; the step's own are then met by themselves."""
    start_next(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.program_id(2)
    first_row = tl.load(offsets + seq)
    rows = tl.load(offsets + seq + 1) - first_row
    start = tl.load(starts + seq)
    begin, stop, parts = context_part(start, split, WINDOW, SPLITS)
    if not EARLY:
        # The step's own rows are the last part's.
        stop = tl.where(split == parts - 1, start + rows, stop)
    active = (rows > 0) & (rows <= ROWS) & (split < parts)
    stop = tl.where(active, stop, begin)
    pages = table + seq.to(tl.int64) * table_stride
    k_head = k_pages + kv_head.to(tl.int64) * k_head_stride
    v_head = v_pages + kv_head.to(tl.int64) * v_head_stride
    first = begin + tl.arange(0, N)
    page = find_pages(pages, first, stop, PAGE)
    loop_begin = begin
    if EARLY:
        first_k, first_v = load_keys(
            k_head, v_head, k_page_stride, v_page_stride, page, first, stop, D, PAGE, DP, True
        )
        page = find_pages(pages, first + N, stop, PAGE)
        loop_begin = begin + N
    wait_previous(PDL)
    if active:
        m = tl.arange(0, M)
        d = tl.arange(0, DP)
        row = m // GROUP
        head = kv_head * GROUP + m % GROUP
        keep = row < rows
        place = ((first_row + row).to(tl.int64) * Q_HEADS + head)[:, None] * D + d[None, :]
        mask = keep[:, None] & (d < D)[None, :]
        queries = tl.load(q + place, mask=mask, other=0.0)
        position = start + row
        total = tl.zeros((M,), tl.float32)
        peak = tl.full((M,), float("-inf"), tl.float32)
        value = tl.zeros((M, DP), tl.float32)
        for at in range(loop_begin, stop, N):
            seen = at + tl.arange(0, N)
            k, v = load_keys(
                k_head, v_head, k_page_stride, v_page_stride, page, seen, stop, D, PAGE, DP, True
            )
            page = find_pages(pages, seen + N, stop, PAGE)
            total, peak, value = attend(
                queries, k, v, position, seen, stop, scale, total, peak, value, WINDOW, True
            )
        if EARLY:
            total, peak, value = attend(
                queries, first_k, first_v, position, first, stop, scale, total, peak, value,
                WINDOW, True,
            )  # fmt: skip
            new = start + tl.arange(0, 16)
            new_stop = tl.where(split == parts - 1, start + rows, start)
            new_page = find_pages(pages, new, new_stop, PAGE)
            k, v = load_keys(
                k_head, v_head, k_page_stride, v_page_stride, new_page, new, new_stop, D, PAGE, DP,
                True,
            )  # fmt: skip
            total, peak, value = attend(
                queries, k, v, position, new, new_stop, scale, total, peak, value, WINDOW, True
            )
        # A row may see no key of this part: weightless, and not 0 / 0.
        blind = total == 0.0
        total = tl.where(blind, 1.0, total)
        value = value / total[:, None]
        if SPLITS == 1:
            tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)
        else:
            slot = ((seq * ROWS + row).to(tl.int64) * Q_HEADS + head) * SPLITS + split
            tl.store(partial + slot[:, None] * D + d[None, :], value, mask=mask)
            lse = tl.where(blind, float("-inf"), peak + tl.log2(total))
            tl.store(partial_lse + slot, lse, mask=keep)


@triton.jit
def _combine_kernel(
    partial,
    partial_lse,
    starts,
    offsets,
    out,
    Q_HEADS: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr,
    DP: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    seq = tl.program_id(0) // ROWS
    row = tl.program_id(0) % ROWS
    head = tl.program_id(1)
    first_row = tl.load(offsets + seq)
    rows = tl.load(offsets + seq + 1) - first_row
    start = tl.load(starts + seq)
    _begin, _stop, parts = context_part(start, 0, WINDOW, SPLITS)
    d = tl.arange(0, DP)
    split = tl.arange(0, SP)
    keep = split < tl.where((row < rows) & (rows <= ROWS), parts, 0)
    slot = (tl.program_id(0).to(tl.int64) * Q_HEADS + head) * SPLITS + split
    mask = keep[:, None] & (d < D)[None, :]
    wait_previous(PDL)
    lse = tl.load(partial_lse + slot, mask=keep, other=float("-inf"))
    value = tl.load(partial + slot[:, None] * D + d[None, :], mask=mask, other=0.0)
    if (row < rows) & (rows <= ROWS):
        weight = tl.exp2(lse - tl.max(lse, axis=0))
        mean = tl.sum(value * weight[:, None], axis=0) / tl.sum(weight, axis=0)
        place = ((first_row + row).to(tl.int64) * Q_HEADS + head) * D + d
        tl.store(out + place, mean.to(out.dtype.element_ty), mask=d < D)


def attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: FlatBatch,
    scale: float,
    window: int | None,
    tile: tuning.SplitTile | tuning.DecodeTile | None = None,
) -> Tensor:
    """See `Ops.attention`.

    Sequences with few rows go to the split kernel, the others to the chunk kernel; a step that may
    hold both launches both, and each leaves the other's sequences alone.
    """
    q = q if q.is_contiguous() else q.contiguous()
    out = torch.empty((len(q), q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
    group = q.shape[1] // k_pages.shape[1]
    short = max(1, min(tuning.SHORT_RUN, 64 // group))
    rows = batch.max_rows if batch.max_rows <= short else 1
    split(q, k_pages, v_pages, batch, scale, window, out, rows, tile)
    if batch.max_rows > short:
        triton_chunk_attention.chunk(q, k_pages, v_pages, batch, scale, window, out, above=rows)
    return out


def split(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: FlatBatch,
    scale: float,
    window: int | None,
    out: Tensor,
    rows: int,
    tile: tuning.SplitTile | tuning.DecodeTile | None = None,
) -> None:
    """Attention of all sequences with at most `rows` rows, written to out [T, Hq * d].

    A `DecodeTile` is for one row and groups of one; it is the default there.
    """
    _, q_heads, head_dim = q.shape
    _, kv_heads, page_size, _ = k_pages.shape
    seqs, group = len(batch.starts), q_heads // kv_heads
    if tile is None and rows * group == 1:
        tile = tuning.decode_tile(seqs * kv_heads, batch.max_len)
    tile = tile or tuning.split_tile(seqs * kv_heads, batch.max_len)
    splits = tile.splits
    padded = max(16, triton.next_power_of_2(head_dim))
    partial = lse = out
    if splits > 1:
        shape = (seqs, rows, q_heads, splits)
        partial = torch.empty((*shape, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    shape = {
        "Q_HEADS": q_heads, "D": head_dim, "WINDOW": window or 0, "SPLITS": splits, "DP": padded,
        **overlapped(q),
    }  # fmt: skip
    arguments = (
        q, k_pages, v_pages, k_pages.stride(0), k_pages.stride(1), v_pages.stride(0),
        v_pages.stride(1), batch.pages, batch.pages.stride(0), batch.starts, batch.offsets,
        out, partial, lse, scale * LOG2_E,
    )  # fmt: skip
    grid = (splits, kv_heads, seqs)
    if isinstance(tile, tuning.DecodeTile):
        # A group of lanes loads a row of a page, 16 bytes each.
        lanes = padded * q.element_size() // 16
        decode_kernel[grid](
            *arguments, PAGE=page_size, KEYS=math.gcd(tile.keys, page_size),
            GROUPS=max(1, 32 * tile.warps // lanes), AHEAD=tile.ahead, **shape,
            num_warps=tile.warps,
        )  # fmt: skip
    else:
        _split_kernel[grid](
            *arguments, GROUP=group, PAGE=page_size, ROWS=rows, N=tile.keys,
            M=max(16, triton.next_power_of_2(rows * group)),
            EARLY=tuning.split_early(tile, seqs * kv_heads, batch.max_len), **shape,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    if splits > 1:
        _combine_kernel[(seqs * rows, q_heads)](
            partial, lse, batch.starts, batch.offsets, out, ROWS=rows,
            SP=triton.next_power_of_2(splits), **shape, num_warps=2,
        )  # fmt: skip
