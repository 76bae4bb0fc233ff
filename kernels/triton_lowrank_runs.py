# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Long runs of rows with low-rank filters: a program marches down a stretch of one sequence.

A step is 32 rows x N channels, N / WARPS of them a warp's; a thread takes 4 consecutive rows.
Filters are made 16 rows at a time on matrix units, with z's rows and U's columns in the order that
puts a filter into the thread that applies it. What the next steps read is on its way to shared
memory meanwhile, in whole cache lines where N is 64 or more, which saves requests to L2.

A stretch lies in one sequence: a program finds its own in the offsets. The first of a sequence
reads the ring for what came before, and stores to it what outlives the step. For streams of whole
tiles and ranks of at most 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_filters import locate_block
from .triton_launch import start_next, wait_previous

RUN = tl.constexpr(4)
"""Consecutive rows of a thread in each step."""


@triton.jit
def locate_stretch(tile, offsets, starts, slots, seqs, SEQS: tl.constexpr, ROWS: tl.constexpr):
    """The tile-th stretch of at most ROWS rows -> (first row, one past the last; of its sequence:
    first row, one past the last, position of the first, slot).

    A tile that there is none for is empty. SEQS: a power of two that `seqs` fit in.
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
def ring_before(ring, ring_stride, stretch, row, channel, W: tl.constexpr, RING: tl.constexpr):
    """Where the ring holds the W - 1 inputs before each of `row`, oldest first."""
    _first, _stop, begin, _end, start, slot = stretch
    places = ()
    for back in tl.static_range(W - 1, 0, -1):
        position = start + row - back - begin
        ring_row = slot * RING + (position & (RING - 1))
        places = places + (ring + ring_row[:, None] * ring_stride + channel,)
    return places


@triton.jit
def load_step(line, x_stride, before, stretch, row, W: tl.constexpr):
    """The inputs of a thread's RUN rows from `row` on and of the W - 1 before: tiles [8, N].

    `line`: where `row` is in x.
    """
    _first, stop, begin, _end, start, _slot = stretch
    inputs = ()
    for j in tl.static_range(1 - W, RUN):
        here = row + j
        at = line + j * x_stride
        live = here < stop
        if j < 0:
            at = tl.where((here < begin)[:, None], before[j + W - 1], at)
            live &= here >= begin - start
        inputs = inputs + (tl.load(at, mask=live[:, None], other=0.0),)
    return inputs


@triton.jit
def load_codes(line, z_stride, row, stop, rank, R: tl.constexpr):
    """z of a step: a tile [16, 16] for each two rows of a thread."""
    codes = ()
    for j in tl.static_range(0, RUN, 2):
        live = (row + j < stop)[:, None] & (rank < R)[None, :]
        codes = codes + (tl.load(line + j * z_stride, mask=live, other=0.0),)
    return codes


@triton.jit
def code_order():
    """Row within a step that each row of a code tile has: two of each thread's."""
    m = tl.arange(0, 16)
    return m % 8 * RUN + m // 8


@triton.jit
def store_last(
    x, x_stride, ring, ring_stride, ring_rows, stretch, column, channel, RING: tl.constexpr
):
    """The first stretch of a sequence stores the rows that outlive the step to the ring.

    It alone reads the sequence's rows of the ring, and has done so. `column`, `channel` [1, N].
    """
    first, stop, begin, end, _start, _slot = stretch
    if (first == begin) & (first < stop):
        tl.debug_barrier()
        for back in range(0, RING, 8):
            row = end - 1 - back - tl.arange(0, 8)
            live = (row >= begin) & (row >= end - RING)
            ring_row = tl.load(ring_rows + row, mask=live, other=-1)
            live = (ring_row >= 0)[:, None]
            value = tl.load(x + row[:, None].to(tl.int64) * x_stride + column, mask=live, other=0.0)
            tl.store(ring + ring_row[:, None] * ring_stride + channel, value, mask=live)


@triton.jit
def filter_columns(N: tl.constexpr, WARPS: tl.constexpr):
    """Channel of each of N accumulator columns: those of a thread are neighbours."""
    n = tl.arange(0, N)
    PART: tl.constexpr = N // WARPS
    return n // 8 % WARPS * PART + n // 2 % 4 * (PART // 4) + n // (8 * WARPS) * 2 + n % 2


@triton.jit
def filter_rows(code, up, tap, N: tl.constexpr, WARPS: tl.constexpr):
    """One tap's filters of each thread's two rows of a code tile, in the order of channels.

    The accumulator's elements are renamed, not moved between threads.
    """
    f = tl.dot(code, up, input_precision="ieee")
    f = tl.reshape(f, (2, 8, N // (8 * WARPS), WARPS, 4, 2))
    f = tl.permute(f, (1, 3, 4, 2, 5, 0))
    first, second = tl.split(f)
    return tl.reshape(first, (8, N)) + tap, tl.reshape(second, (8, N)) + tap


@triton.jit(do_not_specialize=["seqs"])
def lowrank_runs_kernel(
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
    offsets,
    starts,
    slots,
    ring_rows,
    seqs,
    SEGMENTS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    ADD: tl.constexpr,
    RING: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    STEP: tl.constexpr = 8 * RUN
    first_column, start_column, _size, base, z_start = locate_block(tl.program_id(0), SEGMENTS, N)
    rank = tl.arange(0, 16)
    first_channel = base + first_column - start_column
    channel = (first_channel + tl.arange(0, N))[None, :]
    column = (first_column + tl.arange(0, N))[None, :]
    ups = ()
    taps = ()
    for w in tl.static_range(W):
        order = up + (w * D + first_channel + filter_columns(N, WARPS))[None, :]
        mask = (rank < R)[:, None]
        ups = ups + (tl.load(order + rank[:, None] * (W * D), mask=mask, other=0.0),)
        taps = taps + (tl.load(static + w * D + channel),)
    if BIAS:
        shift = tl.load(bias + channel)
    else:
        shift = tl.zeros((1, N), tl.float32)
    wait_previous(PDL)
    stretch = locate_stretch(tl.program_id(1), offsets, starts, slots, seqs, SEQS, ROWS)
    first, stop, _begin, _end, _start, _slot = stretch
    row = first + tl.arange(0, 8) * RUN
    before = ring_before(ring, ring_stride, stretch, row, channel, W, RING)
    line = x + row[:, None].to(tl.int64) * x_stride + column
    place = row[:, None].to(tl.int64) * out_stride + column
    code_row = first + code_order()
    code = z + code_row[:, None].to(tl.int64) * z_stride + (z_start + rank)[None, :]
    for step in tl.range(0, stop - first, STEP, num_stages=STAGES):
        inputs = load_step(line, x_stride, before, stretch, row + step, W)
        codes = load_codes(code, z_stride, code_row + step, stop, rank, R)
        others = ()
        for j in tl.static_range(RUN):
            if ADD:
                at = residual + place + j * out_stride
                live = (row + (step + j) < stop)[:, None]
                others = others + (tl.load(at, mask=live, other=0.0),)
        for p in tl.static_range(0, RUN, 2):
            even = tl.broadcast_to(shift, (8, N))
            odd = even
            for w in tl.static_range(W):
                f_even, f_odd = filter_rows(codes[p // 2], ups[w], taps[w], N, WARPS)
                even += f_even * inputs[p + W - 1 - w].to(tl.float32)
                odd += f_odd * inputs[p + W - w].to(tl.float32)
            for i in tl.static_range(2):
                y = (even if i == 0 else odd) * SCALE
                if SILU:
                    y *= tl.sigmoid(y)
                if ADD:
                    y += others[p + i].to(tl.float32)
                live = (row + (step + p + i) < stop)[:, None]
                at = out + place + (p + i) * out_stride
                tl.store(at, y.to(out.dtype.element_ty), mask=live)
        line += STEP * x_stride
        code += STEP * z_stride
        place += STEP * out_stride
    store_last(x, x_stride, ring, ring_stride, ring_rows, stretch, column, channel, RING)
