# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Stretches of long runs: rows of one sequence that a program takes.

A program finds its stretch in the batch's offsets, so none crosses a sequence. The first stretch of
a sequence reads the ring for what came before, and stores to it what outlives the step; it must be
as long as the rows that read the ring are many, W - 1, or as the sequence.

Knows nothing of filters. A stretch is (first row, one past the last; of its sequence: first row,
one past the last, position of the first, slot).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_stretch(tile, offsets, starts, slots, seqs, SEQS: tl.constexpr, ROWS: tl.constexpr):
    """The tile-th stretch of at most ROWS rows; empty if there is none.

    Reads the batch alone. SEQS: a power of two that `seqs` fit in.
    """
    seq = tl.arange(0, SEQS)
    begin = tl.load(offsets + seq, mask=seq < seqs, other=0)
    end = tl.load(offsets + seq + 1, mask=seq < seqs, other=0)
    tiles = (end - begin + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, 0) - tiles
    mine = (tile >= before) & (tile < before + tiles)
    first = tl.sum(tl.where(mine, begin + (tile - before) * ROWS, 0), 0)
    last = tl.sum(tl.where(mine, end, 0), 0)
    own = tl.sum(tl.where(mine, seq, 0), 0)
    start = tl.load(starts + own)
    slot = tl.load(slots + own).to(tl.int64)
    return first, tl.minimum(first + ROWS, last), tl.load(offsets + own), last, start, slot


@triton.jit
def load_older(
    line,
    x_stride,
    ring,
    ring_stride,
    stretch,
    row,
    channel,
    mask,
    W: tl.constexpr,
    RING: tl.constexpr,
):
    """The W - 1 inputs before each of `row`, oldest first.

    `line`: where `row` is in x; its shape is the result's, and `row`, `channel` (of the ring) and
    `mask` broadcast to it.
    """
    _first, stop, begin, _end, start, slot = stretch
    older = ()
    for back in tl.static_range(W - 1, 0, -1):
        here = row - back
        ring_row = slot * RING + ((start + here - begin) & (RING - 1))
        kept = ring + ring_row * ring_stride + channel
        at = tl.where(here < begin, kept, line - back * x_stride)
        live = mask & (row < stop) & (here >= begin - start)
        older = older + (tl.load(at, mask=live, other=0.0),)
    return older


@triton.jit
def store_last(
    x, x_stride, ring, ring_stride, ring_rows, stretch, column, channel, mask, RING: tl.constexpr
):
    """The first stretch of a sequence stores the rows that outlive the step to the ring.

    It alone reads the sequence's rows of the ring, and has done so. `column`, `channel` and `mask`
    are [N].
    """
    first, stop, begin, end, _start, _slot = stretch
    ROWS: tl.constexpr = RING if RING < 8 else 8
    if (first == begin) & (first < stop):
        tl.debug_barrier()
        for back in range(0, RING, ROWS):
            row = end - 1 - back - tl.arange(0, ROWS)
            ring_row = tl.load(ring_rows + row, mask=row >= begin, other=-1)
            live = (ring_row >= 0)[:, None] & mask[None, :]
            line = x + row[:, None].to(tl.int64) * x_stride + column[None, :]
            value = tl.load(line, mask=live, other=0.0)
            tl.store(ring + ring_row[:, None] * ring_stride + channel[None, :], value, mask=live)
