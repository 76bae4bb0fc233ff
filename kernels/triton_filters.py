# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Device functions of a short convolution with carried state: rows, windows, filters.

The kernels of the conv, QKV, and MLP ops are built from these. A kernel first calls every
`locate` and `load_*` function it needs and only then `convolve`: a `tl.dot` stages its operands
through shared memory, and no load written after its barrier is issued before it, so a load out of
order costs a whole memory latency. Filters live in registers only.

Knows nothing of q, k, v, gates or norms: a tile is rows x channels of one stream.

A low-rank filter is made (GENERATE) by "fma", products in registers, for a row or a few; by "dot",
matrix units; or by "swap", matrix units without the exchange through shared memory that brings the
window to the accumulator's layout. For that, the rows of z and the columns of `up` enter the
product in the order (`swap_rows`, `swap_columns`) in which the accumulator, read as 8 consecutive
channels a thread, has the very layout in which a [M, 32] tile of x is loaded.

Names: `row` [M] rows of the flat batch, `column` [N] columns of x, `channel` [N] covered channels
(the ring's and the weights' numbering), `within` [N] channels counted from the stream's start.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate_block(block, SEGMENTS: tl.constexpr, N: tl.constexpr):
    """Where a block of N columns is -> (first column; its segment's start, size, first covered
    channel or -1, first z column)."""
    first = 0
    start = 0
    stop = 0
    base = 0
    z_start = 0
    for i in tl.static_range(len(SEGMENTS)):
        begun = block >= SEGMENTS[i][0]
        first = tl.where(begun, SEGMENTS[i][0], first)
        start = tl.where(begun, SEGMENTS[i][1], start)
        stop = tl.where(begun, SEGMENTS[i][2], stop)
        base = tl.where(begun, SEGMENTS[i][3], base)
        z_start = tl.where(begun, SEGMENTS[i][4], z_start)
    return start + (block - first) * N, start, stop - start, base, z_start


@triton.jit
def locate_rows(
    row,
    first,
    count,
    meta,
    W: tl.constexpr,
    RING: tl.constexpr,
    MODE: tl.constexpr,
    M: tl.constexpr,
):
    """Where the M rows from `first` on stand -> (keep, spot, ring row).

    `meta`: the batch's positions, row_seq, starts, slots and ring_rows.
    MODE "decode": no sequence has more than one row. "short": runs whose rows are stored by the
    same launch. "long": anything else; nearly every tile then lies inside one sequence and needs
    nothing but its rows of x, so that `spot` is only whether this tile is an exception.
    """
    positions, row_seq, starts, slots, ring_rows = meta
    keep = row < count
    if MODE == "long":
        # A sequence's rows are consecutive and padding comes last.
        inner = (first >= W - 1) & (first + M <= count)
        begin = tl.load(row_seq + first - (W - 1), mask=inner, other=0)
        end = tl.load(row_seq + first + M - 1, mask=inner, other=1)
        live = tl.load(positions + first + M - 1, mask=inner, other=-1)
        spot = ((begin != end) | (live < 0),)
        ring_row = row
    else:
        # A row's own ring row names its slot, which saves a dependent load.
        position = tl.load(positions + row, mask=keep, other=-1)
        ring_row = tl.load(ring_rows + row, mask=keep, other=-1)
        seq = tl.load(row_seq + row, mask=keep, other=0)
        slot = tl.load(slots + seq, mask=keep & (ring_row < 0), other=0).to(tl.int64)
        slot_row = tl.where(ring_row >= 0, ring_row - (ring_row & (RING - 1)), slot * RING)
        if MODE == "decode":
            local = position * 0
        else:
            local = position - tl.load(starts + seq, mask=keep, other=0)
        spot = (position, local, slot_row)
    return keep, spot, ring_row


@triton.jit
def load_window(
    x,
    x_stride,
    ring,
    ring_stride,
    row,
    first_row,
    count,
    meta,
    spot,
    column,
    channel,
    valid,
    convolved,
    W: tl.constexpr,
    RING: tl.constexpr,
    MODE: tl.constexpr,
    M: tl.constexpr,
):
    """The last W inputs of each row, current first: a tuple of W tiles [M, N].

    `valid` [N]: the column exists. `convolved` [N]: it also has older inputs to read.
    """
    keep = row < count
    if MODE == "long":
        here = x + row[:, None].to(tl.int64) * x_stride + column[None, :]
        window = (tl.load(here, mask=keep[:, None] & valid[None, :], other=0.0),)
        for w in tl.static_range(1, W):
            near = (keep & (row >= w))[:, None] & valid[None, :]
            window = window + (tl.load(here - w * x_stride, mask=near, other=0.0),)
        if spot[0]:
            _keep, place, _ring_row = locate_rows(row, first_row, count, meta, W, RING, "short", M)
            past = load_past(ring, ring_stride, place, channel, convolved, W, RING, "short")
            window = join_past(x, x_stride, row, count, place, past, column, valid, W, "short")
    else:
        past = load_past(ring, ring_stride, spot, channel, convolved, W, RING, MODE)
        window = join_past(x, x_stride, row, count, spot, past, column, valid, W, MODE)
    return window


@triton.jit
def load_past(
    ring,
    ring_stride,
    spot,
    channel,
    convolved,
    W: tl.constexpr,
    RING: tl.constexpr,
    MODE: tl.constexpr,
):
    """The W - 1 inputs before each row where earlier steps left them, zeros where they did not.

    No kernel of this step writes them, so they may be read before the kernel before is done.
    MODE "long": nothing; few rows need them.
    """
    past = ()
    if MODE != "long":
        position, local, slot_row = spot
        for w in tl.static_range(1, W):
            ring_row = slot_row + ((position - w) & (RING - 1))
            old = (position >= w) & (local < w)
            tap = tl.load(
                ring + ring_row[:, None] * ring_stride + channel[None, :],
                mask=old[:, None] & convolved[None, :],
                other=0.0,
            )
            past = past + (tap,)
    return past


@triton.jit
def join_past(
    x, x_stride, row, count, spot, past, column, valid, W: tl.constexpr, MODE: tl.constexpr
):
    """As `load_window`, its older inputs that earlier steps left being there. Not for "long"."""
    _position, local, _slot_row = spot
    keep = row < count
    here = x + row[:, None].to(tl.int64) * x_stride + column[None, :]
    window = (tl.load(here, mask=keep[:, None] & valid[None, :], other=0.0),)
    for w in tl.static_range(1, W):
        tap = past[w - 1]
        if MODE == "short":
            new = keep & (local >= w)
            near = tl.load(here - w * x_stride, mask=new[:, None] & valid[None, :], other=0.0)
            tap = tl.where(new[:, None], near, tap)
        window = window + (tap,)
    return window


@triton.jit
def load_weights(
    up,
    static,
    bias,
    channel,
    keep,
    order,
    order_keep,
    D: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """The weights of a tile's channels -> (up tiles, static taps [1, N] each, bias [1, N]).

    `order` [N]: the tile's channels in the order that filters are made in, swapped or as they are.
    `up` tiles by GENERATE: W tiles [R padded, N]; "fma", W * R tiles [M, N].
    """
    ups = ()
    if KIND == "lowrank":
        if GENERATE == "fma":
            for w in tl.static_range(W):
                for r in tl.static_range(R):
                    pointer = up + (r * W + w) * D + tl.broadcast_to(order[None, :], (M, N))
                    # Spread over the rows, so that it has the layout of the window: no exchange.
                    mask = tl.broadcast_to(order_keep[None, :], (M, N))
                    ups = ups + (tl.load(pointer, mask=mask, other=0.0),)
        else:
            rank = tl.arange(0, padded_rank(R))
            for w in tl.static_range(W):
                pointer = up + rank[:, None] * (W * D) + w * D + order[None, :]
                mask = (rank < R)[:, None] & order_keep[None, :]
                ups = ups + (tl.load(pointer, mask=mask, other=0.0),)
    taps = ()
    for w in tl.static_range(W):
        tap = tl.load(static + w * D + order[None, :], mask=order_keep[None, :], other=0.0)
        taps = taps + (tap,)
    if BIAS:
        shift = tl.load(bias + channel[None, :], mask=keep[None, :], other=0.0)
    else:
        shift = tl.zeros((1, N), tl.float32)
    return ups, taps, shift


@triton.jit
def load_code(
    z,
    z_stride,
    row,
    keep,
    z_start,
    first,
    within,
    valid,
    W: tl.constexpr,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    N: tl.constexpr,
):
    """What the rows' filters are made from: a tuple of tiles.

    lowrank: "fma", R tiles [M, 1]; else one [M, R padded], `row` and `keep` in the order that the
    filters are made in; "sum" (M = 1), one [R padded, 1].
    headwise: W tiles [M, N]. GENERATE "group": the N channels start at `first` and consist of
    groups that lie inside one head; one value a group is loaded, by the thread that needs it.
    """
    code = ()
    line = z + row[:, None].to(tl.int64) * z_stride + z_start
    if KIND == "lowrank":
        if GENERATE == "fma":
            for r in tl.static_range(R):
                code = code + (tl.load(line + r, mask=keep[:, None], other=0.0),)
        elif GENERATE == "sum":
            rank = tl.arange(0, padded_rank(R))
            first = tl.min(row, axis=0)
            pointer = z + first.to(tl.int64) * z_stride + z_start + rank[:, None]
            code = (tl.load(pointer, mask=(rank < R)[:, None], other=0.0),)
        else:
            rank = tl.arange(0, padded_rank(R))
            mask = keep[:, None] & (rank < R)[None, :]
            code = (tl.load(line + rank[None, :], mask=mask, other=0.0),)
    elif KIND == "headwise":
        if GENERATE == "group":
            UNIT: tl.constexpr = group_size(HEAD)
            head = (first + tl.arange(0, N // UNIT) * UNIT) // HEAD
            for w in tl.static_range(W):
                tap = tl.load(line + (head * W + w)[None, :], mask=keep[:, None], other=0.0)
                wide = tl.broadcast_to(tap[:, :, None], (tap.shape[0], N // UNIT, UNIT))
                code = code + (tl.reshape(wide, (tap.shape[0], N)),)
        else:
            mask = keep[:, None] & valid[None, :]
            for w in tl.static_range(W):
                pointer = line + ((within // HEAD) * W + w)[None, :]
                code = code + (tl.load(pointer, mask=mask, other=0.0),)
    return code


@triton.jit
def convolve(
    window,
    code,
    weights,
    W: tl.constexpr,
    R: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """Generates each row's filter and applies it. -> [M, N] float32."""
    ups, taps, shift = weights
    y = tl.broadcast_to(shift, (M, N))
    for w in tl.static_range(W):
        f = tl.broadcast_to(taps[w], (M, N))
        if KIND == "lowrank":
            if GENERATE == "fma":
                for r in tl.static_range(R):
                    f += code[r].to(tl.float32) * ups[w * R + r].to(tl.float32)
            elif GENERATE == "sum":
                products = code[0].to(tl.float32) * ups[w].to(tl.float32)
                f += tl.sum(products, axis=0)[None, :]
            else:
                f = tl.dot(code[0], ups[w], acc=f, input_precision="ieee")
                if GENERATE == "swap":
                    f = unswap(f, M, N)
        elif KIND == "headwise":
            f += code[w].to(tl.float32)
        y += f * window[w].to(tl.float32)
    y *= SCALE
    if SILU:
        y *= tl.sigmoid(y)
    return y


@triton.jit
def swap_columns(N: tl.constexpr):
    """Channel of each of 32 accumulator columns: every 8 hold a pair for each of 4 threads."""
    tl.static_assert(N == 32)
    n = tl.arange(0, N)
    return n // 2 % 4 * 8 + n // 8 * 2 + n % 2


@triton.jit
def swap_rows(M: tl.constexpr):
    """Row of each accumulator row: 4 warps of 16 rows for M = 64; one warp keeps the order."""
    m = tl.arange(0, M)
    return m // 16 * 8 + m // 8 % 2 * 32 + m % 8 if M == 64 else m


@triton.jit
def unswap(f, M: tl.constexpr, N: tl.constexpr):
    """An accumulator in swapped order, in plain order. Moves no data between threads."""
    if M == 64:
        f = tl.reshape(f, (4, 2, 8, 4, 4, 2))
        f = tl.permute(f, (1, 0, 2, 4, 3, 5))
    else:
        f = tl.reshape(f, (M, 4, 4, 2))
        f = tl.permute(f, (0, 2, 1, 3))
    return tl.reshape(f, (M, N))


@triton.constexpr_function
def padded_rank(rank):
    """The least K that `tl.dot` takes for `rank` products."""
    padded = 16
    while padded < rank:
        padded *= 2
    return padded


@triton.constexpr_function
def group_size(head):
    """Channels of one head that a thread loads together: at most 8, 16 bytes of bfloat16."""
    return 8 if head % 8 == 0 else 4 if head % 4 == 0 else 2 if head % 2 == 0 else 1
