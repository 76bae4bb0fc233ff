# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""q, k and v in one launch: convolution, per-head QK-norm, RoPE, the store into KV pages and ring.

A tile is some rows x one head in halves (`triton_heads`). Knows nothing of attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_conv, tuning
from .triton_filters import (
    convolve,
    group_size,
    join_past,
    load_code,
    load_past,
    load_weights,
    load_window,
    locate_rows,
    swap_columns,
    swap_rows,
)
from .triton_heads import halves, load_norms, locate_head, store_head, turn
from .triton_launch import overlapped, start_next, wait_previous
from .triton_norm import norm_qk
from .triton_qkv_lowrank_runs import qkv_lowrank_runs_kernel
from .triton_qkv_runs import qkv_runs_kernel

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter
    from .ops import QKNorm


@triton.jit(do_not_specialize=["count"])
def _qkv_kernel(
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
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    RING: tl.constexpr,
    MODE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    REPEAT: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    HALF: tl.constexpr = (HEAD_DIM + 1) // 2
    TURN: tl.constexpr = ROTARY // 2
    BLOCKS: tl.constexpr = (HALF + N - 1) // N
    head = tl.program_id(0) // BLOCKS
    is_q, is_v, part_head, base, z_start, before = locate_head(head, PARTS, Q_HEADS, KV_HEADS)
    covered = base >= 0

    first_pair = (tl.program_id(0) % BLOCKS) * N
    pair = first_pair + tl.arange(0, N)
    low, high = halves(pair, HEAD_DIM, ROTARY)
    low_valid = pair < HALF
    high_valid = low_valid & (high < HEAD_DIM)
    turned = (pair < TURN) & (head + 0 * pair < Q_HEADS + KV_HEADS)
    low_convolved = low_valid & (base + 0 * pair >= 0)
    high_convolved = high_valid & (base + 0 * pair >= 0)

    offset = tl.maximum(base, 0) + part_head * HEAD_DIM
    if KIND != "none":
        low_order = low
        high_order = high
        low_keep = low_convolved
        high_keep = high_convolved
        if GENERATE == "swap":
            swapped = first_pair + swap_columns(N)
            low_order, high_order = halves(swapped, HEAD_DIM, ROTARY)
            low_keep = (swapped < HALF) & (base + 0 * pair >= 0)
            high_keep = low_keep & (high_order < HEAD_DIM)
        low_weights = load_weights(
            up, static, bias, offset + low, low_convolved, offset + low_order, low_keep,
            D, W, R, KIND, GENERATE, BIAS, M, N,
        )  # fmt: skip
        high_weights = load_weights(
            up, static, bias, offset + high, high_convolved, offset + high_order, high_keep,
            D, W, R, KIND, GENERATE, BIAS, M, N,
        )  # fmt: skip
    norms = load_norms(norm_q, norm_k, is_q, low, high, low_valid, high_valid, NORM)
    pages = (k_pages, v_pages, k_page_stride, k_head_stride, v_page_stride, v_head_stride)
    meta = (positions, row_seq, starts, slots, ring_rows)
    for i in range(REPEAT):
        first_row = (tl.program_id(1) * REPEAT + i) * M
        row = first_row + tl.arange(0, M)
        keep = row < count
        kv_row = tl.load(kv_rows + row, mask=keep, other=-1)
        if KIND == "none":
            wait_previous(PDL)
            line = x + row[:, None].to(tl.int64) * x_stride + head * HEAD_DIM
            low_mask = keep[:, None] & low_valid[None, :]
            a = tl.load(line + low[None, :], mask=low_mask, other=0.0).to(tl.float32)
            high_mask = keep[:, None] & high_valid[None, :]
            b = tl.load(line + high[None, :], mask=high_mask, other=0.0).to(tl.float32)
        else:
            keep, spot, ring_row = locate_rows(row, first_row, count, meta, W, RING, MODE, M)
            low_past = load_past(
                ring, ring_stride, spot, offset + low, low_convolved, W, RING, MODE
            )
            high_past = load_past(
                ring, ring_stride, spot, offset + high, high_convolved, W, RING, MODE
            )
            wait_previous(PDL)
            code_row = row
            if GENERATE == "swap":
                code_row = first_row + swap_rows(M)
            use = (code_row < count) & (base + 0 * row >= 0)
            low_code = load_code(
                z, z_stride, code_row, use, z_start,
                before + part_head * HEAD_DIM + first_pair,
                before + part_head * HEAD_DIM + low,
                low_valid, W, R, HEAD, KIND, GENERATE, N,
            )  # fmt: skip
            if KIND == "headwise":
                high_code = load_code(
                    z, z_stride, row, use, z_start,
                before + part_head * HEAD_DIM + ROTARY // 2 + first_pair,
                before + part_head * HEAD_DIM + high,
                    high_valid, W, R, HEAD, KIND, GENERATE, N,
                )  # fmt: skip
            else:
                high_code = low_code
            column = head * HEAD_DIM
            if MODE == "long":
                low_window = load_window(
                    x, x_stride, ring, ring_stride, row, first_row, count, meta, spot,
                    column + low, offset + low, low_valid, low_convolved, W, RING, MODE, M,
                )  # fmt: skip
                high_window = load_window(
                    x, x_stride, ring, ring_stride, row, first_row, count, meta, spot,
                    column + high, offset + high, high_valid, high_convolved, W, RING, MODE, M,
                )  # fmt: skip
            else:
                low_window = join_past(
                    x, x_stride, row, count, spot, low_past, column + low, low_valid, W, MODE
                )
                high_window = join_past(
                    x, x_stride, row, count, spot, high_past, column + high, high_valid, W, MODE
                )
        angle = rope + row[:, None].to(tl.int64) * ROTARY + pair[None, :]
        angle_mask = keep[:, None] & turned[None, :]
        cos = tl.load(angle, mask=angle_mask, other=1.0)
        sin = tl.load(angle + TURN, mask=angle_mask, other=0.0)
        if KIND != "none":
            a = convolve(low_window, low_code, low_weights, W, R, KIND, GENERATE, SCALE, SILU, M, N)
            b = convolve(
                high_window, high_code, high_weights, W, R, KIND, GENERATE, SCALE, SILU, M, N
            )
            a = tl.where(covered, a, low_window[0].to(tl.float32))
            b = tl.where(covered, b, high_window[0].to(tl.float32))
            if MODE != "long":
                target = ring + ring_row[:, None] * ring_stride + offset
                stored = (ring_row >= 0)[:, None]
                low_mask = stored & low_convolved[None, :]
                tl.store(target + low[None, :], low_window[0], mask=low_mask)
                high_mask = stored & high_convolved[None, :]
                tl.store(target + high[None, :], high_window[0], mask=high_mask)
        first, second = turn(
            a, b, cos, sin, norms, is_v, low_valid, high_valid,
            q_out.dtype.element_ty, HEAD_DIM, NORM, EPS,
        )  # fmt: skip
        store_head(
            first, second, row, keep, kv_row, low, high, low_valid, high_valid, head, part_head,
            is_q, is_v, q_out, pages, Q_HEADS, HEAD_DIM, PAGE,
        )  # fmt: skip


def qkv_rope_write(
    qkv: Tensor,
    z: Tensor | None,
    filters: ConvFilter | None,
    ring: Tensor | None,
    norm: QKNorm | None,
    rope: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: FlatBatch,
    tile: tuning.ConvTile | None = None,
) -> Tensor:
    """See `Ops.qkv_rope_write`. One launch, or with steps split off it where the row must be whole:

    norm_first and full-width norms take a launch of their own, and so does the ring store of a
    chunk that wraps the ring.
    """
    _, kv_heads, page_size, head_dim = k_pages.shape
    q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if norm is not None and norm.order == "norm_first":
        qkv, norm = norm_qk(qkv, norm, q_heads, kv_heads, head_dim), None
    parts = None if filters is None else _parts(filters, q_heads, kv_heads, head_dim)
    if filters is not None and (parts is None or (norm is not None and norm.mode == "full")):
        assert ring is not None
        qkv, filters = triton_conv.conv(qkv, z, filters, ring, batch), None
    if norm is not None and norm.mode == "full":
        qkv, norm = norm_qk(qkv, norm, q_heads, kv_heads, head_dim), None

    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    count = len(qkv)
    q = torch.empty((count, q_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    half = (head_dim + 1) // 2
    mode = "long" if filters is None else triton_conv.step_mode(filters, batch)
    seqs = len(batch.slots)
    whole = mode == "long" and rope.shape[1] == head_dim and half in (32, 64, 128)
    if whole and filters is not None and filters.kind == "lowrank":
        assert parts is not None
        whole = filters.rank <= 16 and all(base >= 0 for base, _, _ in parts)
    tile = tile or tuning.qkv_tile(count, filters, count // seqs if whole else 0, half)
    runs = tile.generate == "runs"
    pairs = min(tile.channels, triton.next_power_of_2(half))
    if norm is not None or runs:
        pairs = triton.next_power_of_2(half)
    heads = q_heads + 2 * kv_heads
    grid = (heads * triton.cdiv(half, pairs), triton.cdiv(count, tile.rows * tile.repeat))
    common = {
        "Q_HEADS": q_heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "PAGE": page_size,
        "NORM": norm is not None, "EPS": 0.0 if norm is None else norm.eps, "N": pairs,
        "num_warps": tile.warps, **overlapped(qkv),
    }  # fmt: skip
    tiled = {"ROTARY": rope.shape[1], "M": tile.rows, "REPEAT": tile.repeat, "MODE": mode}
    norms = (qkv, qkv) if norm is None else (norm.q, norm.k)
    pages = (
        k_pages, v_pages, k_pages.stride(0), k_pages.stride(1), v_pages.stride(0), v_pages.stride(1)
    )  # fmt: skip
    meta = (
        batch.positions, batch.row_seq, batch.starts, batch.slots, batch.ring_rows, batch.kv_rows
    )  # fmt: skip
    if filters is None:
        _qkv_kernel[grid](
            qkv, qkv.stride(0), qkv, 0, qkv, qkv, qkv, qkv, 0, *norms, rope, q, *pages, *meta,
            count, PARTS=((-1, 0, 0),) * 3, D=1, W=1, R=0, HEAD=0, KIND="none", GENERATE="none",
            BIAS=False, SCALE=1.0, SILU=False, RING=1, **tiled, **common,
        )  # fmt: skip
        return q
    assert ring is not None
    assert parts is not None
    z = z if z is None or z.stride(1) == 1 else z.contiguous()
    arguments = (
        qkv, qkv.stride(0), qkv if z is None else z, 0 if z is None else z.stride(0),
        qkv if filters.up is None else filters.up, filters.static,
        filters.static if filters.bias is None else filters.bias,
        ring, triton_conv.ring_row_stride(ring), *norms, rope, q, *pages, *meta, count,
    )  # fmt: skip
    shapes = {
        "PARTS": parts, "D": filters.channels, "W": filters.width,
        "BIAS": filters.bias is not None, "SCALE": filters.scale,
        "SILU": filters.activation == "silu", "RING": batch.ring_len, **common,
    }  # fmt: skip
    kinds = {
        "HEAD": filters.head_size, "KIND": filters.kind,
        "GENERATE": _generate_mode(filters, parts, pairs, head_dim, rope.shape[1], tile.generate),
    }  # fmt: skip
    if not runs:
        _qkv_kernel[grid](*arguments, R=filters.rank, **tiled, **shapes, **kinds)
    else:
        grid = (heads, triton_conv.stretches(count, seqs, tile.rows))
        arguments = (
            *arguments[:19], batch.offsets, batch.starts, batch.slots, batch.ring_rows,
            batch.kv_rows, seqs,
        )  # fmt: skip
        shapes = {**shapes, **triton_conv.stretched(tile, seqs, qkv)}
        if filters.kind == "lowrank":
            qkv_lowrank_runs_kernel[grid](
                *arguments, R=filters.rank, WARPS=tile.warps, STAGES=tile.stages, **shapes
            )
        else:
            qkv_runs_kernel[grid](*arguments, **shapes, **kinds)
    if mode == "long" and not runs:
        triton_conv.store_ring(qkv, filters, ring, batch)
    return q


def _parts(
    filters: ConvFilter, q_heads: int, kv_heads: int, head_dim: int
) -> tuple[tuple[int, int, int], ...] | None:
    """For q, k and v: (covered channel or -1, z column, channels of the stream before the part).

    None if a stream's edge falls inside a part; then the convolution runs on its own.
    """
    edges = (0, q_heads, q_heads + kv_heads, q_heads + 2 * kv_heads)
    parts: list[tuple[int, int, int]] = []
    for start, stop in ((edges[i] * head_dim, edges[i + 1] * head_dim) for i in range(3)):
        covered = 0
        part = (-1, 0, 0)
        for stream in filters.streams:
            if stream.start <= start and stop <= stream.stop:
                part = (covered + start - stream.start, stream.z_start, start - stream.start)
            elif stream.start < stop and start < stream.stop:
                return None
            covered += stream.stop - stream.start
        parts.append(part)
    return tuple(parts)


def _generate_mode(
    filters: ConvFilter,
    parts: tuple[tuple[int, int, int], ...],
    pairs: int,
    head_dim: int,
    rotary: int,
    wanted: str,
) -> str:
    """As `triton_conv.generate_mode`, for halves of heads."""
    if filters.kind == "lowrank":
        return "dot" if wanted == "swap" and pairs != 32 else wanted
    if filters.kind == "static":
        return "none"
    unit = group_size(filters.head_size)
    # Halves of heads must start at whole groups of the stream.
    whole = (
        rotary == head_dim and head_dim % (2 * pairs) == 0 and all(p[2] % unit == 0 for p in parts)
    )
    return "group" if whole and 1 < unit <= pairs else "gather"
