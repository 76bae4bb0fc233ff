# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""The convolution op on its own: one launch over all streams, and the ring store for long chunks.

Launch geometry comes from shapes and the batch's bounds alone. Knows nothing of what the convolved
tensor is for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_filters import (
    convolve,
    group_size,
    join_past,
    load_code,
    load_past,
    load_weights,
    load_window,
    locate_block,
    locate_rows,
    swap_columns,
    swap_rows,
)
from .triton_launch import overlapped, start_next, wait_previous
from .triton_lowrank_runs import lowrank_runs_kernel
from .triton_runs import runs_kernel

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter, Stream

Segment = tuple[int, int, int, int]
"""(first column, one past the last, first covered channel or -1 if none covers it, first z column):
the columns of a tensor cut at the edges of its streams."""


@triton.jit(do_not_specialize=["count"])
def _conv_kernel(
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
    MODE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    REPEAT: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    first_column, start, size, base, z_start = locate_block(tl.program_id(0), SEGMENTS, N)
    within = first_column - start + tl.arange(0, N)
    valid = within < size
    convolved = valid & (base + 0 * within >= 0)
    column = start + within
    channel = tl.maximum(base, 0) + within
    order = channel
    order_keep = convolved
    if GENERATE == "swap":
        swapped = first_column - start + swap_columns(N)
        order = tl.maximum(base, 0) + swapped
        order_keep = (swapped < size) & (base + 0 * within >= 0)
    ups, taps, shift = load_weights(
        up, static, bias, channel, convolved, order, order_keep,
        D, W, R, KIND, GENERATE, BIAS, M, N,
    )  # fmt: skip
    meta = (positions, row_seq, starts, slots, ring_rows)
    for i in range(REPEAT):
        first_row = (tl.program_id(1) * REPEAT + i) * M
        row = first_row + tl.arange(0, M)
        keep, spot, ring_row = locate_rows(row, first_row, count, meta, W, RING, MODE, M)
        past = load_past(ring, ring_stride, spot, channel, convolved, W, RING, MODE)
        wait_previous(PDL)
        code_row = row
        if GENERATE == "swap":
            code_row = first_row + swap_rows(M)
        code_keep = (code_row < count) & (base + 0 * row >= 0)
        code = load_code(
            z, z_stride, code_row, code_keep, z_start, first_column - start, within, valid,
            W, R, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
        if MODE == "long":
            window = load_window(
                x, x_stride, ring, ring_stride, row, first_row, count, meta, spot,
                column, channel, valid, convolved, W, RING, MODE, M,
            )  # fmt: skip
        else:
            window = join_past(x, x_stride, row, count, spot, past, column, valid, W, MODE)
        inside = keep[:, None] & valid[None, :]
        place = row[:, None].to(tl.int64) * out_stride + column[None, :]
        if ADD:
            before = tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        weights = (ups, taps, shift)
        y = convolve(window, code, weights, W, R, KIND, GENERATE, SCALE, SILU, M, N)
        y = tl.where(base >= 0, y, window[0].to(tl.float32))
        if ADD:
            y += before
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
        if MODE != "long":
            target = ring + ring_row[:, None] * ring_stride + channel[None, :]
            tl.store(target, window[0], mask=(ring_row >= 0)[:, None] & convolved[None, :])


@triton.jit
def _ring_store_kernel(
    x,
    x_stride,
    ring,
    ring_stride,
    offsets,
    ring_rows,
    SEGMENTS: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The last ring_len rows of each sequence: only they survive the step."""
    start_next(PDL)
    wait_previous(PDL)
    first_column, start, size, base, _z = locate_block(tl.program_id(2), SEGMENTS, N)
    within = first_column - start + tl.arange(0, N)
    seq = tl.program_id(0)
    row = tl.load(offsets + seq + 1) - 1 - tl.program_id(1)
    if row >= tl.load(offsets + seq):
        ring_row = tl.load(ring_rows + row)
        mask = (within < size) & (ring_row + 0 * within >= 0)
        value = tl.load(x + row.to(tl.int64) * x_stride + start + within, mask=mask, other=0.0)
        tl.store(ring + ring_row * ring_stride + base + within, value, mask=mask)


def conv(
    x: Tensor,
    z: Tensor | None,
    filters: ConvFilter,
    ring: Tensor,
    batch: FlatBatch,
    residual: Tensor | None = None,
    tile: tuning.ConvTile | None = None,
    mode: str | None = None,
) -> Tensor:
    """See `Ops.conv`; with `residual` [T, C] contiguous, the sum of both. `mode` in place of that
    of `step_mode`: "long" is right for every step."""
    x, z = _rows(x), _rows(z)
    count, width = x.shape
    pieces = segments(filters.streams, width)
    mode = mode or step_mode(filters, batch)
    whole = mode == "long" and takes_runs(filters, pieces)
    tile = tile or tuning.conv_tile(count, filters, count // len(batch.slots) if whole else 0)
    blocked, blocks = _blocked(pieces, tile.channels)
    out = torch.empty((count, width), dtype=x.dtype, device=x.device)
    generate = generate_mode(filters, pieces, tile.channels, tile.generate)
    arguments = (
        x, x.stride(0), x if z is None else z, 0 if z is None else z.stride(0),
        x if filters.up is None else filters.up, filters.static,
        filters.static if filters.bias is None else filters.bias,
        ring, ring_row_stride(ring), x if residual is None else residual, out, width,
        batch.positions, batch.row_seq, batch.starts, batch.slots, batch.ring_rows, count,
    )  # fmt: skip
    shapes = {
        "SEGMENTS": blocked, "D": filters.channels, "W": filters.width,
        "BIAS": filters.bias is not None, "SCALE": filters.scale,
        "SILU": filters.activation == "silu", "ADD": residual is not None,
        "RING": batch.ring_len, "num_warps": tile.warps, **overlapped(x),
    }  # fmt: skip
    kinds = {"HEAD": filters.head_size, "KIND": filters.kind, "GENERATE": generate,
             "N": tile.channels}  # fmt: skip
    runs = tile.generate == "runs"
    if not runs:
        grid = (blocks, triton.cdiv(count, tile.rows * tile.repeat))
        _conv_kernel[grid](
            *arguments,
            R=filters.rank,
            MODE=mode,
            M=tile.rows,
            REPEAT=tile.repeat,
            **shapes,
            **kinds,
        )
    else:
        seqs = len(batch.slots)
        grid = (blocks, stretches(count, seqs, tile.rows))
        arguments = (
            *arguments[:12], batch.offsets, batch.starts, batch.slots, batch.ring_rows, seqs
        )  # fmt: skip
        shapes = {**shapes, "WARPS": tile.warps, **stretched(tile, seqs, x)}
        if filters.kind == "lowrank":
            lowrank_runs_kernel[grid](
                *arguments, R=filters.rank, N=tile.channels, STAGES=tile.stages, **shapes
            )
        else:
            runs_kernel[grid](*arguments, **shapes, **kinds)
    if mode == "long" and not runs:
        store_ring(x, filters, ring, batch)
    return out


def store_ring(x: Tensor, filters: ConvFilter, ring: Tensor, batch: FlatBatch) -> None:
    """Writes the rows that outlive the step to the ring, in a launch of its own."""
    covered = tuple(s for s in segments(filters.streams, x.shape[1]) if s[2] >= 0)
    block = min(1024, triton.next_power_of_2(max(s[1] - s[0] for s in covered)))
    blocked, blocks = _blocked(covered, block)
    grid = (len(batch.slots), min(batch.ring_len, batch.max_rows), blocks)
    _ring_store_kernel[grid](
        x, x.stride(0), ring, ring_row_stride(ring), batch.offsets, batch.ring_rows,
        SEGMENTS=blocked, N=block, num_warps=4 if block >= 512 else 1, **overlapped(x),
    )  # fmt: skip


def step_mode(filters: ConvFilter, batch: FlatBatch) -> str:
    """The MODE of `triton_filters.locate_rows`.

    Rows are stored by the launch that reads the ring, unless a row of this step lands on a ring
    row that another row of this step may still read.
    """
    if batch.max_rows + filters.width - 2 >= batch.ring_len:
        return "long"
    return "decode" if batch.max_rows == 1 else "short"


def takes_runs(filters: ConvFilter, pieces: tuple[Segment, ...]) -> bool:
    """Whether the kernel of long runs takes such filters over such columns."""
    if filters.kind != "lowrank":
        return True
    whole = all(base >= 0 and (stop - start) % 32 == 0 for start, stop, base, _ in pieces)
    return whole and filters.rank <= 16


def stretches(count: int, seqs: int, rows: int) -> int:
    """Most stretches of at most `rows` rows of one sequence that `count` rows consist of."""
    return (count + seqs * (rows - 1)) // rows


def stretched(tile: tuning.ConvTile, seqs: int, x: Tensor) -> dict[str, int]:
    """Launch arguments of kernels that take stretches of rows."""
    cuda = x.is_cuda and torch.version.hip is None
    return {
        # Few sizes: each is a kernel of its own.
        "SEQS": max(32, triton.next_power_of_2(seqs)), "ROWS": tile.rows,
        **({"maxnreg": tile.registers} if cuda and tile.registers else {}),
    }  # fmt: skip


def ring_row_stride(ring: Tensor) -> int:
    """Elements between ring rows; slots follow each other without a gap."""
    if ring.stride(0) != ring.shape[1] * ring.stride(1) or ring.stride(2) != 1:
        raise ValueError(f"ring: slots must be evenly spaced rows, strides are {ring.stride()}")
    return ring.stride(1)


def generate_mode(
    filters: ConvFilter, pieces: tuple[Segment, ...], channels: int, wanted: str
) -> str:
    """`wanted` for low-rank filters; for head-wise ones, whether tiles are made of whole groups."""
    if filters.kind == "lowrank":
        return wanted
    if filters.kind == "static":
        return "none"
    whole = all((e - s) % channels == 0 for s, e, c, _ in pieces if c >= 0)
    return "group" if whole and 1 < group_size(filters.head_size) <= channels else "gather"


@lru_cache(maxsize=256)
def segments(streams: tuple[Stream, ...], width: int) -> tuple[Segment, ...]:
    """Cuts columns 0 .. width at the edges of the streams."""
    pieces: list[Segment] = []
    at = covered = 0
    for stream in streams:
        if stream.start > at:
            pieces.append((at, stream.start, -1, 0))
        pieces.append((stream.start, stream.stop, covered, stream.z_start))
        covered += stream.stop - stream.start
        at = stream.stop
    if at < width:
        pieces.append((at, width, -1, 0))
    return tuple(pieces)


@lru_cache(maxsize=1024)
def _blocked(pieces: tuple[Segment, ...], block: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Each piece behind the index of its first block, and the number of blocks."""
    blocked: list[tuple[int, ...]] = []
    blocks = 0
    for piece in pieces:
        blocked.append((blocks, *piece))
        blocks += triton.cdiv(piece[1] - piece[0], block)
    return tuple(blocked), blocks


def _rows(x: Tensor | None) -> Tensor:
    """x with unit stride inside rows."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()
