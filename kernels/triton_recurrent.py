# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Linear recurrences with state in place: the gated delta rule and Mamba-2's SSD.

A step in which no sequence has more than one row reads and writes each head's state once
(`triton_recurrent_step`); otherwise rows are taken in chunks (`triton_recurrent_chunk`). In both,
the state of a sequence that starts at position 0 is zero whatever the slot holds, and a sequence
without rows touches nothing. Gated norms whose group one program of a step holds are fused into it;
the others take a launch (`_norm_kernel`).

Both recurrences are one kernel: `DELTA` says which. See `reference_recurrent` for the mathematics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_conv
from .triton_launch import overlapped, start_next, wait_previous
from .triton_recurrent_chunk import walk
from .triton_recurrent_step import INDICES, silu, step_kernel

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .filters import ConvFilter
    from .recurrent import DeltaParts, SSDParts


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=INDICES)
def _norm_kernel(
    x,
    gate,
    gate_stride,
    norm,
    out,
    positions,
    count,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """RMSNorm of one group of M rows [WIDTH] float32, times silu(gate) if GATED; `SHARED`: all
    groups have one weight."""
    start_next(PDL)
    j = tl.arange(0, N)[None, :]
    group = tl.program_id(0)
    row = (tl.program_id(1) * M + tl.arange(0, M)).to(tl.int64)[:, None]
    weight_at = j if SHARED else group * WIDTH + j
    weight = tl.load(norm + weight_at, mask=j < WIDTH, other=0.0).to(tl.float32)
    position = tl.load(positions + row, mask=row < count, other=-1)
    keep = (j < WIDTH) & (position >= 0)  # nobody wrote x where a row is padding
    wait_previous(PDL)
    place = row * (GROUPS * WIDTH) + group * WIDTH + j
    value = tl.load(x + place, mask=keep, other=0.0)
    y = value * tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + EPS)[:, None] * weight
    if GATED:
        there = gate + row * gate_stride + group * WIDTH + j
        y *= silu(tl.load(there, mask=keep, other=0.0).to(tl.float32))
    tl.store(out + place, y.to(out.dtype.element_ty), mask=(j < WIDTH) & (row < count))


def delta_rule(
    parts: DeltaParts,
    qkv: Tensor,
    z: Tensor | None,
    filters: ConvFilter | None,
    ring: Tensor | None,
    gate: Tensor,
    b: Tensor,
    a: Tensor,
    state: Tensor,
    batch: FlatBatch,
) -> Tensor:
    """See `Ops.delta_rule`. One launch where no sequence has more than one row and filters are not
    low-rank; the convolution's, the chunks' and the norm's otherwise.

    Padding rows are left unwritten, or hold anything.
    """
    p = parts
    q_width, k_width, _ = p.widths
    shape = {
        "Q_AT": 0, "K_AT": q_width, "V_AT": q_width + k_width,
        "GROUP": p.value_heads // p.key_heads, "HEADS": p.value_heads, "K": p.key_dim,
        "V": p.value_dim, "DELTA": True, "SILU_Q": p.silu[0], "SILU_K": p.silu[1],
        "SILU_V": p.silu[2], "SCALE": p.key_dim**-0.5,
    }  # fmt: skip
    scalars = (b, a, p.rate, p.dt_bias, p.rate, p.norm)
    y, is_normed = _recur(shape, qkv, z, filters, ring, gate, scalars, p.eps, state, batch)
    if is_normed:
        return y
    return _normed(y, gate, p.norm, p.eps, p.value_heads, qkv.dtype, batch, is_delta=True)


def ssd(
    parts: SSDParts,
    xbc: Tensor,
    z: Tensor | None,
    filters: ConvFilter | None,
    ring: Tensor | None,
    gate: Tensor,
    dt: Tensor,
    state: Tensor,
    batch: FlatBatch,
) -> Tensor:
    """See `Ops.ssd`. As `delta_rule`, with a launch for the norm in any case."""
    p = parts
    inner, shared, _ = p.widths
    shape = {
        "Q_AT": inner + shared, "K_AT": inner, "V_AT": 0, "GROUP": p.heads // p.groups,
        "HEADS": p.heads, "K": p.state_dim, "V": p.head_dim, "DELTA": False, "SILU_Q": False,
        "SILU_K": False, "SILU_V": False, "SCALE": 1.0,
    }  # fmt: skip
    scalars = (dt, dt, p.rate, p.dt_bias, p.skip, p.norm)
    y, _ = _recur(shape, xbc, z, filters, ring, gate, scalars, p.eps, state, batch)
    return _normed(y, gate, p.norm, p.eps, p.groups, xbc.dtype, batch, is_delta=False)


def _recur(
    shape: dict[str, Any],
    x: Tensor,
    z: Tensor | None,
    filters: ConvFilter | None,
    ring: Tensor | None,
    gate: Tensor,
    scalars: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    eps: float,
    state: Tensor,
    batch: FlatBatch,
) -> tuple[Tensor, bool]:
    """The convolution and the recurrence.

    Args:
        scalars: b, a, rate, dt_bias, skip, norm.

    Returns:
        The delta rule's output in x's dtype and True, where one program held all of V and normed
        it; otherwise o, or SSD's gated y, in float32, and False.
    """
    _, heads, key_dim, value_dim = state.shape
    b, a, rate, dt_bias, skip, norm = scalars
    padded = max(16, triton.next_power_of_2(key_dim))
    count, seqs, width = len(x), len(batch.starts), heads * value_dim
    is_step = batch.max_rows == 1
    conv, streams = None, ((-1, 0),) * 3
    if filters is not None:
        assert ring is not None
        if is_step:
            conv, streams = _fused_conv(shape, filters, batch)
        if conv is None:
            x = triton_conv.conv(x, z, filters, ring, batch)
    addresses = (gate, gate.stride(0), b, b.stride(0), a, a.stride(0), rate, dt_bias, skip)
    rows = (batch.starts, batch.offsets, batch.slots)
    if is_step:
        block, blocks, warps = step_tile(key_dim, value_dim, heads * seqs)
        parts = triton.cdiv(value_dim, block * blocks)
        is_fused = bool(shape["DELTA"]) and parts == 1
        dtype = x.dtype if is_fused else torch.float32
        out = torch.empty((count, width), dtype=dtype, device=x.device)
        windows = (x, 0, rate, rate, x, 0)
        if conv is not None:
            assert filters is not None
            assert ring is not None
            windows = (
                x if z is None else z, 0 if z is None else z.stride(0), filters.static,
                filters.static if filters.bias is None else filters.bias, ring,
                triton_conv.ring_row_stride(ring),
            )  # fmt: skip
        step_kernel[(heads, seqs, parts)](
            x, x.stride(0), *windows, batch.ring_rows, *addresses, norm, state, out, *rows,
            **shape, EPS=eps, KP=padded, N=block, BLOCKS=blocks, FUSED=is_fused, CONV=conv,
            STREAMS=streams, num_warps=warps, **overlapped(x),
        )  # fmt: skip
        return out, is_fused
    return walk(shape, x, gate, scalars[:5], state, batch, chunk_tile(value_dim)), False


def _fused_conv(
    shape: dict[str, Any], filters: ConvFilter, batch: FlatBatch
) -> tuple[tuple[Any, ...] | None, tuple[tuple[int, int], ...]]:
    """CONV and STREAMS of `step_kernel`; None if the step cannot apply these filters."""
    if filters.kind == "lowrank" or filters.activation != "silu" or filters.scale != 1.0:
        return None, ((-1, 0),) * 3
    conv = (
        filters.kind, filters.width, filters.channels, batch.ring_len, max(filters.head_size, 1),
        filters.bias is not None,
    )  # fmt: skip
    group, key, value = shape["GROUP"], shape["K"], shape["V"]
    starts = (shape["Q_AT"], shape["K_AT"], shape["V_AT"])
    widths = (shape["HEADS"] // group * key,) * 2 + (shape["HEADS"] * value,)
    found: list[tuple[int, int]] = []
    for start, width in zip(starts, widths, strict=True):
        covered = 0
        place = (-1, 0)
        for s in filters.streams:
            if s.start <= start and start + width <= s.stop:
                inside = start - s.start
                code = s.z_start + inside // max(filters.head_size, 1) * filters.width
                place = (covered + inside, code)
                if filters.head_size and inside % filters.head_size:
                    return None, ((-1, 0),) * 3
            covered += s.stop - s.start
        found.append(place)
    if sum(w for w, place in zip(widths, found, strict=True) if place[0] >= 0) != filters.channels:
        return None, ((-1, 0),) * 3
    return conv, tuple(found)


def _normed(
    x: Tensor,
    gate: Tensor,
    norm: Tensor,
    eps: float,
    groups: int,
    dtype: torch.dtype,
    batch: FlatBatch,
    *,
    is_delta: bool,
) -> Tensor:
    """RMSNorm of each group of x [T, D] float32; gated after it for the delta rule."""
    count, width = len(x), x.shape[1] // groups
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(width)
    rows = 1 if count <= 256 else max(1, min(8, 2048 // block))
    _norm_kernel[(groups, triton.cdiv(count, rows))](
        x, gate, gate.stride(0), norm, out, batch.positions, count, WIDTH=width, GROUPS=groups,
        SHARED=is_delta, GATED=is_delta, EPS=eps, M=rows, N=block,
        num_warps=max(1, min(8, rows * block // 256)), **overlapped(x),
    )  # fmt: skip
    return out


def step_tile(key_dim: int, value_dim: int, programs: int) -> tuple[int, int, int]:
    """(channels of V in a block, blocks of a program, warps); `programs`: heads x sequences.

    Measured on an H100 with 12 heads of 96 x 256, batch 1, 8 and 64: narrow programs win, also over
    the launch that they leave the norm to (64 us at batch 64, where four blocks take 114).
    """
    widest = triton.next_power_of_2(value_dim)
    block = min(widest, 32 if programs < 64 else 128 if widest <= 128 else 64)
    padded = max(16, triton.next_power_of_2(key_dim))
    return block, 1, max(1, min(4, padded * block // 2048))


def chunk_tile(value_dim: int) -> tuple[int, int]:
    """(channels of V of a program, warps)."""
    return max(16, min(32, triton.next_power_of_2(value_dim))), 4
