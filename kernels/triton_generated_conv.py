# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
# pyright: reportAttributeAccessIssue=false
"""One token's convolution with filters of their own for every channel, made by a linear layer from
SiLU of a code (Jet-Nemotron's): product, taps, SiLU and the ring store in one launch.

A program makes the W filters of N channels for M rows on matrix units; its rows of the generator
are on their way before the code is waited for, and the filters stay in registers. Knows nothing of
what follows, nor of runs of more than one row: there the generator is a linear layer like others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_conv import ring_row_stride
from .triton_launch import overlapped, start_next, wait_previous
from .triton_recurrent_step import INDICES, silu

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter
    from .weights import PackedLinear

DEEPEST = 1024
"""Inputs of a generator whose rows a program can hold."""

MOST = 2
"""Sequences of a step. A Jet layer of one sequence takes 32 us on an H100 so, and 41 with a linear
layer whose filters the recurrence's step applies; for 4 and 8 sequences that is the faster one."""


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=INDICES)
def _generated_conv_kernel(
    x,
    x_stride,
    code,
    code_stride,
    weight,
    shift,
    static,
    ring,
    ring_stride,
    out,
    positions,
    ring_rows,
    count,
    COLUMNS: tl.constexpr,
    START: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    RING: tl.constexpr,
    K: tl.constexpr,
    SHIFT: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Columns START .. START + D of x are convolved, the others copied by the last programs."""
    start_next(PDL)
    BLOCKS: tl.constexpr = (D + N - 1) // N
    block = tl.program_id(0)
    row = tl.program_id(1) * M + tl.arange(0, M)
    if block >= BLOCKS:
        wait_previous(PDL)
        other = (block - BLOCKS) * (N * W) + tl.arange(0, N * W)
        other = tl.where(other < START, other, other + D)[:, None]
        copied = (other < COLUMNS) & (row < count)[None, :]
        whole = row.to(tl.int64)[None, :]
        same = tl.load(x + whole * x_stride + other, mask=copied, other=0.0)
        tl.store(out + whole * COLUMNS + other, same, mask=copied)
    else:
        output = block * (N * W) + tl.arange(0, N * W)
        weights = ()
        for at in tl.static_range(0, K, BK):
            k = at + tl.arange(0, BK)
            mask = (output < D * W)[:, None] & (k < K)[None, :]
            place = weight + output[:, None] * K + k[None, :]
            weights = weights + (tl.load(place, mask=mask, other=0.0),)
        channel = block * N + tl.arange(0, N)
        channels = channel[:, None, None]
        w = tl.arange(0, W)[None, :, None]
        taps = tl.load(static + w * D + channels, mask=channels + 0 * w < D, other=0.0)
        if SHIFT:
            spread = channels * W + w
            taps += tl.load(shift + spread, mask=spread < D * W, other=0.0).to(tl.float32)
        wait_previous(PDL)
        position = tl.load(positions + row, mask=row < count, other=-1)
        keep = position >= 0
        ring_row = tl.load(ring_rows + row, mask=keep, other=0)
        line = x + row.to(tl.int64) * x_stride + START
        inside = (channel < D)[:, None] & keep[None, :]
        now = tl.load(line[None, :] + channel[:, None], mask=inside, other=0.0)
        # A live row's ring row is in its own slot, and no row that is read here is written here.
        older = ring_row - (ring_row & (RING - 1))
        older = older[None, None, :] + ((position[None, None, :] - w) & (RING - 1))
        past = (channels < D) & keep[None, None, :] & (w > 0) & (position[None, None, :] >= w)
        window = tl.load(ring + older * ring_stride + channels, mask=past, other=0.0)
        codes = ()
        for at in tl.static_range(0, K, BK):
            k = at + tl.arange(0, BK)
            mask = (k < K)[:, None] & keep[None, :]
            place = code + row.to(tl.int64)[None, :] * code_stride + k[:, None]
            codes = codes + (tl.load(place, mask=mask, other=0.0),)
        filters = tl.zeros((N * W, M), tl.float32)
        for i in tl.static_range((K + BK - 1) // BK):
            z = silu(codes[i].to(tl.float32)).to(weights[i].dtype)
            filters = tl.dot(weights[i], z, acc=filters, input_precision="ieee")
        filters = tl.reshape(filters, (N, W, M)) + taps
        inputs = tl.where(w == 0, now[:, None, :].to(tl.float32), window.to(tl.float32))
        y = silu(tl.sum(filters * inputs, axis=1))
        place = out + row.to(tl.int64)[None, :] * COLUMNS + START + channel[:, None]
        tl.store(place, y.to(out.dtype.element_ty), mask=inside)
        tl.store(ring + ring_row[None, :] * ring_stride + channel[:, None], now, mask=inside)


@triton.jit
def _silu_kernel(x, x_stride, out, COLUMNS: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    wait_previous(PDL)
    value = tl.load(x + row * x_stride + column, mask=column < COLUMNS, other=0.0)
    y = silu(value.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * COLUMNS + column, y, mask=column < COLUMNS)


def silu_code(code: Tensor) -> Tensor:
    """SiLU of a generator's code [T, K]. Unlike torch's, it overlaps with what precedes and follows
    it, the generator's weights above all."""
    count, columns = code.shape
    out = torch.empty((count, columns), dtype=code.dtype, device=code.device)
    block = min(512, triton.next_power_of_2(columns))
    _silu_kernel[(count, triton.cdiv(columns, block))](
        code, code.stride(0), out, COLUMNS=columns, N=block, num_warps=4, **overlapped(code)
    )
    return out


def can_generate(generator: PackedLinear, filters: ConvFilter, batch: FlatBatch) -> bool:
    """Whether `generated_conv` takes these filters in this step."""
    return (
        batch.max_rows == 1
        and len(batch.starts) <= MOST
        and filters.kind == "headwise"
        and filters.head_size == 1
        and len(filters.streams) == 1
        and filters.streams[0].z_start == 0
        and filters.width in (2, 4, 8)
        and filters.activation == "silu"
        and filters.scale == 1.0
        and filters.bias is None
        and generator.in_features <= DEEPEST
    )


def generated_conv(
    x: Tensor,
    code: Tensor,
    generator: PackedLinear,
    filters: ConvFilter,
    ring: Tensor,
    batch: FlatBatch,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """The convolution of `Ops.delta_rule` with a generator; for what `can_generate` allows.

    Padding rows hold anything.

    Args:
        tile: (channels of a program, warps).
    """
    count, columns = x.shape
    width, channels, depth = filters.width, filters.channels, generator.in_features
    block, warps = tile or generate_tile(count, width, depth)
    rows = max(8, min(64, triton.next_power_of_2(count)))
    out = torch.empty((count, columns), dtype=x.dtype, device=x.device)
    blocks = triton.cdiv(channels, block) + triton.cdiv(columns - channels, block * width)
    bias = generator.bias
    _generated_conv_kernel[(blocks, triton.cdiv(count, rows))](
        x, x.stride(0), code, code.stride(0), generator.weight,
        generator.weight if bias is None else bias, filters.static, ring, ring_row_stride(ring),
        out, batch.positions, batch.ring_rows, count, COLUMNS=columns,
        START=filters.streams[0].start, D=channels, W=width, RING=batch.ring_len, K=depth,
        SHIFT=bias is not None, M=rows, N=block,
        BK=max(16, min(128, triton.next_power_of_2(depth))), num_warps=warps, **overlapped(x),
    )  # fmt: skip
    return out


def generate_tile(rows: int, width: int, depth: int) -> tuple[int, int]:
    """(channels of a program, warps): 64 filter taps, or 32 where the generator is deep."""
    taps = 64 if depth <= 512 else 32
    return max(1, taps // width), 4
