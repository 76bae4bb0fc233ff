# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Long runs of rows with low-rank filters: threads march down a stretch of one sequence.

A stretch (`triton_stretches`) is cut into 8 spans of rows. A thread marches down one, RUN rows a
step, and keeps its last inputs, so every input is read once; what the next steps read is on its way
to shared memory meanwhile. Filters are made 16 rows at a time on matrix units, with z's rows and
U's columns in the order that puts a filter into the thread that applies it.

A tile is [8 spans, WARPS, N / WARPS channels]: with three axes, the layout that the compiler gives
loads and stores is that of the product, so that nothing moves between threads. For streams of whole
tiles and ranks of at most 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_filters import locate_block
from .triton_launch import start_next, wait_previous
from .triton_stretches import load_older, locate_stretch, store_last

RUN = tl.constexpr(4)
"""Rows of a thread in each step; even, and at least W - 1 or inputs are not fetched ahead."""


@triton.jit
def span_rows(first, stop):
    """-> (rows of a span, first row of each of the 8)."""
    span = (stop - first + 8 * RUN - 1) // (8 * RUN) * RUN
    return span, first + tl.arange(0, 8) * span


@triton.jit
def code_rows(first, span):
    """Row of z that each row of the first code tile [16] of a step has: two of each span."""
    m = tl.arange(0, 16)
    return first + m % 8 * span + m // 8


@triton.jit
def load_codes(line, z_stride, row, stop, rank, R: tl.constexpr):
    """z of a step: a code tile [16, 16] for each two rows of a thread."""
    codes = ()
    for j in tl.static_range(0, RUN, 2):
        live = (row + j < stop)[:, None] & (rank < R)[None, :]
        codes = codes + (tl.load(line + j * z_stride, mask=live, other=0.0),)
    return codes


@triton.jit
def load_rows(line, x_stride, older, row, stop, N: tl.constexpr, WARPS: tl.constexpr):
    """`older` and the RUN inputs of each span from `row` [8] on. `line` [8, N]: whole rows."""
    inputs = older
    for j in tl.static_range(RUN):
        now = tl.load(line + j * x_stride, mask=(row + j < stop)[:, None], other=0.0)
        inputs = inputs + (tl.reshape(now, (8, WARPS, N // WARPS)),)
    return inputs


@triton.jit
def last_rows(inputs, W: tl.constexpr):
    """The W - 1 inputs that the next step calls older."""
    older = ()
    for w in tl.static_range(W - 1):
        older = older + (inputs[RUN + w],)
    return older


@triton.jit
def tile_channels(N: tl.constexpr, WARPS: tl.constexpr):
    """Channels of a tile, [1, WARPS, N / WARPS]."""
    PART: tl.constexpr = N // WARPS
    return tl.arange(0, WARPS)[None, :, None] * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def filter_columns(N: tl.constexpr, WARPS: tl.constexpr):
    """Channel of each of N accumulator columns: those of a thread are neighbours."""
    n = tl.arange(0, N)
    PART: tl.constexpr = N // WARPS
    return n // 8 % WARPS * PART + n // 2 % 4 * (PART // 4) + n // (8 * WARPS) * 2 + n % 2


@triton.jit
def filter_rows(code, up, tap, N: tl.constexpr, WARPS: tl.constexpr):
    """One tap's filters of each thread's two rows of a code tile, as two tiles.

    The accumulator's elements are renamed, not moved between threads.
    """
    f = tl.dot(code, up, input_precision="ieee")
    f = tl.reshape(f, (2, 8, N // (8 * WARPS), WARPS, 4, 2))
    f = tl.permute(f, (1, 3, 4, 2, 5, 0))
    first, second = tl.split(f)
    first = tl.reshape(first, (8, WARPS, N // WARPS))
    second = tl.reshape(second, (8, WARPS, N // WARPS))
    return first + tap, second + tap


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
    first_column, start_column, _size, base, z_start = locate_block(tl.program_id(0), SEGMENTS, N)
    first_channel = base + first_column - start_column
    rank = tl.arange(0, 16)
    flat = tl.arange(0, N)
    lane = tile_channels(N, WARPS)
    ups = ()
    taps = ()
    for w in tl.static_range(W):
        order = up + (w * D + first_channel + filter_columns(N, WARPS))[None, :]
        mask = (rank < R)[:, None]
        ups = ups + (tl.load(order + rank[:, None] * (W * D), mask=mask, other=0.0),)
        taps = taps + (tl.load(static + w * D + first_channel + lane),)
    if BIAS:
        shift = tl.load(bias + first_channel + lane)
    else:
        shift = tl.zeros((1, WARPS, N // WARPS), tl.float32)
    stretch = locate_stretch(tl.program_id(1), offsets, starts, slots, seqs, SEQS, ROWS)
    wait_previous(PDL)
    first, stop, _begin, _end, _start, _slot = stretch
    span, row = span_rows(first, stop)
    tall = row[:, None, None]
    here = x + tall.to(tl.int64) * x_stride + (first_column + lane)
    older = load_older(
        here, x_stride, ring, ring_stride, stretch, tall, first_channel + lane, lane < N, W, RING
    )
    # Whole rows are fetched: a cache line of x a row where N is 64.
    line = x + row[:, None].to(tl.int64) * x_stride + (first_column + flat)[None, :]
    place = tall.to(tl.int64) * out_stride + (first_column + lane)
    code_row = code_rows(first, span)
    code = z + code_row[:, None].to(tl.int64) * z_stride + (z_start + rank)[None, :]
    for step in tl.range(0, span, RUN, num_stages=STAGES):
        inputs = load_rows(line, x_stride, older, row + step, stop, N, WARPS)
        codes = load_codes(code, z_stride, code_row + step, stop, rank, R)
        others = ()
        for j in tl.static_range(RUN):
            if ADD:
                at = residual + place + j * out_stride
                others = others + (tl.load(at, mask=tall + (step + j) < stop, other=0.0),)
        for p in tl.static_range(0, RUN, 2):
            even = tl.broadcast_to(shift, (8, WARPS, N // WARPS))
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
                at = out + place + (p + i) * out_stride
                tl.store(at, y.to(out.dtype.element_ty), mask=tall + (step + p + i) < stop)
        older = last_rows(inputs, W)
        line += RUN * x_stride
        code += RUN * z_stride
        place += RUN * out_stride
    store_last(
        x, x_stride, ring, ring_stride, ring_rows, stretch, first_column + flat,
        first_channel + flat, flat < N, RING,
    )  # fmt: skip
