# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Long runs of rows with static or head-wise filters: inputs slide through registers.

A program takes one stretch (`triton_stretches`) of ROWS rows x N channels, in 256 WARPS / N spans
of rows; a thread takes 8 channels of one span, so a row's older taps are its own earlier loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_filters import load_code, load_weights, locate_block
from .triton_launch import start_next, wait_previous
from .triton_stretches import load_older, locate_stretch, store_last


@triton.jit
def load_taps(
    z,
    z_stride,
    row,
    keep,
    z_start,
    first,
    within,
    valid,
    W: tl.constexpr,
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    N: tl.constexpr,
):
    """`load_code` of static and head-wise filters; four taps of eight channels are one load."""
    if KIND == "headwise" and GENERATE == "group" and W == 4 and HEAD % 8 == 0:
        M: tl.constexpr = row.shape[0]
        head = (first + tl.arange(0, N // 8) * 8) // HEAD
        line = z + row[:, None, None].to(tl.int64) * z_stride + z_start
        at = line + (head * W)[None, :, None] + tl.arange(0, W)[None, None, :]
        taps = tl.load(at, mask=keep[:, None, None], other=0.0)
        even, odd = tl.split(tl.reshape(taps, (M, N // 8, 2, 2)))
        first_tap, third = tl.split(even)
        second, fourth = tl.split(odd)
        narrow = (first_tap, second, third, fourth)
        code = ()
        for w in tl.static_range(W):
            wide = tl.broadcast_to(narrow[w][:, :, None], (M, N // 8, 8))
            code = code + (tl.reshape(wide, (M, N)),)
    else:
        code = load_code(
            z, z_stride, row, keep, z_start, first, within, valid,
            W, 0, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
    return code


@triton.jit(do_not_specialize=["seqs"])
def runs_kernel(
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
    HEAD: tl.constexpr,
    KIND: tl.constexpr,
    GENERATE: tl.constexpr,
    BIAS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    ADD: tl.constexpr,
    RING: tl.constexpr,
    SEQS: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    G: tl.constexpr = 256 * WARPS // N
    J: tl.constexpr = ROWS // G
    tl.static_assert(J * G == ROWS and ROWS >= W - 1)
    first_column, start_column, size, base, z_start = locate_block(tl.program_id(0), SEGMENTS, N)
    part = first_column - start_column
    within = part + tl.arange(0, N)
    valid = within < size
    convolved = valid & (base + 0 * within >= 0)
    channel = tl.maximum(base, 0) + within
    _ups, taps, shift = load_weights(
        up, static, bias, channel, convolved, channel, convolved,
        D, W, 0, KIND, GENERATE, BIAS, G, N,
    )  # fmt: skip
    stretch = locate_stretch(tl.program_id(1), offsets, starts, slots, seqs, SEQS, ROWS)
    wait_previous(PDL)
    first, stop, _begin, _end, _start, _slot = stretch
    row = first + tl.arange(0, G) * J
    column = (start_column + within)[None, :]
    line = x + row[:, None].to(tl.int64) * x_stride + column
    place = row[:, None].to(tl.int64) * out_stride + column
    # All loads come before the stores: none is moved above one.
    inputs = load_older(
        line, x_stride, ring, ring_stride, stretch, row[:, None], channel[None, :],
        convolved[None, :], W, RING,
    )  # fmt: skip
    codes = ()
    others = ()
    for j in tl.static_range(J):
        keep = row + j < stop
        inside = keep[:, None] & valid[None, :]
        inputs = inputs + (tl.load(line + j * x_stride, mask=inside, other=0.0),)
        code = load_taps(
            z, z_stride, row + j, keep & (base + 0 * row >= 0), z_start, part, within, convolved,
            W, HEAD, KIND, GENERATE, N,
        )  # fmt: skip
        codes = codes + (code,)
        if ADD:
            other = tl.load(residual + place + j * out_stride, mask=inside, other=0.0)
            others = others + (other,)
    for j in tl.static_range(J):
        y = tl.broadcast_to(shift, (G, N))
        for w in tl.static_range(W):
            f = tl.broadcast_to(taps[w], (G, N))
            if KIND == "headwise":
                f += codes[j][w].to(tl.float32)
            y += f * inputs[j + W - 1 - w].to(tl.float32)
        y *= SCALE
        if SILU:
            y *= tl.sigmoid(y)
        # Columns that no stream covers pass through.
        y = tl.where(base >= 0, y, inputs[j + W - 1].to(tl.float32))
        if ADD:
            y += others[j].to(tl.float32)
        inside = (row + j < stop)[:, None] & valid[None, :]
        tl.store(out + place + j * out_stride, y.to(out.dtype.element_ty), mask=inside)
    store_last(
        x, x_stride, ring, ring_stride, ring_rows, stretch, start_column + within, channel,
        convolved, RING,
    )  # fmt: skip
