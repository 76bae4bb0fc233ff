# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Linear layers for few rows: a GEMV and a skinny GEMM that stream the weights once.

At few rows a linear layer is a read of its weights; cuBLAS leaves a third of the bus idle on the
smaller ones. The table in `tuning` says where these kernels win, everything else is cuBLAS.

Knows nothing of what is multiplied. Weights are [out, in], as torch keeps them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_launch import overlapped, stages_that_fit, start_next, wait_previous


@triton.jit
def _outputs(out_features, N: tl.constexpr, GATED: tl.constexpr):
    """The N outputs of this program -> (rows of the weight, which of them exist).

    GATED: half of them are gates, the other half what they gate, `out_features / 2` rows later.
    """
    i = tl.arange(0, N)
    if GATED:
        n = tl.program_id(0) * (N // 2) + i % (N // 2)
        return n + i // (N // 2) * (out_features // 2), n < out_features // 2
    n = tl.program_id(0) * N + i
    return n, n < out_features


@triton.jit
def _store(out, y, count, out_features, M: tl.constexpr, N: tl.constexpr, GATED: tl.constexpr):
    """y [N, M] -> out [count, out_features], or silu(gate) * up [count, out_features / 2]."""
    width = out_features
    size: tl.constexpr = N // 2 if GATED else N
    if GATED:
        width = out_features // 2
        gate, up = tl.split(tl.permute(tl.reshape(y, (2, size, M)), (1, 2, 0)))
        y = gate * tl.sigmoid(gate) * up
    n = tl.program_id(0) * size + tl.arange(0, size)
    m = tl.arange(0, M)
    place = out + m[None, :] * width + n[:, None]
    there = (n < width)[:, None] & (m < count)[None, :]
    tl.store(place, y.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def _gemv_kernel(
    x,
    x_stride,
    weight,
    bias,
    out,
    count,
    out_features,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """At most M rows of x. Products are kept apart per lane and summed once, at the end."""
    start_next(PDL)
    n, valid = _outputs(out_features, N, GATED)
    # Unrolled, so that all weights are on their way together, before x is known.
    weights = ()
    for at in tl.static_range(0, K, BK):
        k = at + tl.arange(0, BK)
        mask = valid[:, None] & (k < K)[None, :]
        w_at = weight + n[:, None].to(tl.int64) * K + k[None, :]
        weights = weights + (tl.load(w_at, mask=mask, other=0.0),)
    wait_previous(PDL)
    totals = ()
    for _m in tl.static_range(M):
        totals = totals + (tl.zeros((N, BK), tl.float32),)
    for i in tl.static_range((K + BK - 1) // BK):
        k = i * BK + tl.arange(0, BK)
        mask = valid[:, None] & (k < K)[None, :]
        w = weights[i].to(tl.float32)
        sums = ()
        for m in tl.static_range(M):
            # Spread over the outputs, so that it has the layout of the weights: no exchange.
            at_x = x + m * x_stride + tl.broadcast_to(k[None, :], (N, BK))
            there = tl.full((1, 1), m, tl.int32) < count
            value = tl.load(at_x, mask=mask & there, other=0.0)
            sums = sums + (totals[m] + w * value.to(tl.float32),)
        totals = sums
    shift = tl.zeros((N,), tl.float32)
    if BIAS:
        shift = tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        y = tl.reshape(tl.sum(totals[m], axis=1) + shift, (N, 1))
        width = out_features // 2 if GATED else out_features
        _store(out + m * width, y, count - m, out_features, 1, N, GATED)


@triton.jit
def _operands(
    x, x_stride, rows, valid, m, count, at, K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr
):
    """Pointers and masks of a step of depth from `at` on: weights, then x.

    [N, BK] and [M, BK], or with SLICES [SLICES, N, BK / SLICES] and [SLICES, M, BK / SLICES].
    """
    if SLICES == 1:
        n_rows, n_valid, x_rows = rows[:, None], valid[:, None], m[:, None]
        depth = at + tl.arange(0, BK)[None, :]
    else:
        n_rows, n_valid, x_rows = rows[None, :, None], valid[None, :, None], m[None, :, None]
        depth = at + tl.arange(0, SLICES)[:, None, None] * (BK // SLICES)
        depth += tl.arange(0, BK // SLICES)[None, None, :]
    inside = depth < K
    there = (x_rows < count) & inside
    return n_rows + depth, n_valid & inside, x + x_rows * x_stride + depth, there


@triton.jit
def _multiply(w, value, total, SLICES: tl.constexpr):
    turned = tl.trans(value) if SLICES == 1 else tl.permute(value, (0, 2, 1))
    return tl.dot(w, turned, acc=total, input_precision="ieee")


@triton.jit(do_not_specialize=["count"])
def _skinny_kernel(
    x,
    x_stride,
    weight,
    bias,
    out,
    count,
    out_features,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    EARLY: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """On matrix units. SLICES pieces of the depth are multiplied side by side, one a warp, and
    summed at the end: a single one is a chain of dependent products that takes longer than the
    read of its weights where a program has few outputs.

    The weights of the first EARLY steps are fetched before x is waited for, and used last: the
    pipeline of the others starts without waiting for them.

    With PARTS a program takes a part of the depth, and out is [PARTS, count, out_features].
    """
    start_next(PDL)
    n, valid = _outputs(out_features, N, GATED)
    m = tl.arange(0, M)
    rows = weight + n.to(tl.int64) * K
    begin = 0
    end = K
    if PARTS > 1:
        length: tl.constexpr = (K + BK * PARTS - 1) // (BK * PARTS) * BK
        begin = tl.program_id(1) * length
        end = tl.minimum(begin + length, K)
        out += tl.program_id(1) * count * out_features
    early_weights = ()
    for i in tl.static_range(EARLY):
        at = begin + i * BK
        w_at, w_mask, _, _ = _operands(x, x_stride, rows, valid, m, count, at, K, BK, SLICES)
        early_weights = early_weights + (tl.load(w_at, mask=w_mask, other=0.0),)
    wait_previous(PDL)
    early_values = ()
    for i in tl.static_range(EARLY):
        at = begin + i * BK
        _, _, x_at, x_mask = _operands(x, x_stride, rows, valid, m, count, at, K, BK, SLICES)
        early_values = early_values + (tl.load(x_at, mask=x_mask, other=0.0),)
    totals = tl.zeros((N, M) if SLICES == 1 else (SLICES, N, M), tl.float32)
    for at in range(begin + EARLY * BK, end, BK):
        w_at, w_mask, x_at, x_mask = _operands(
            x, x_stride, rows, valid, m, count, at, K, BK, SLICES
        )
        w = tl.load(w_at, mask=w_mask, other=0.0)
        value = tl.load(x_at, mask=x_mask, other=0.0)
        totals = _multiply(w, value, totals, SLICES)
    for i in tl.static_range(EARLY):
        totals = _multiply(early_weights[i], early_values[i], totals, SLICES)
    total = totals if SLICES == 1 else tl.sum(totals, axis=0)
    if BIAS:
        # Once, with the first part.
        there = valid & (tl.program_id(1) == 0)
        total += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[:, None]
    _store(out, total, count, out_features, M, N, GATED)


@triton.jit(do_not_specialize=["count"])
def _held_kernel(
    x,
    x_stride,
    weight,
    bias,
    out,
    count,
    out_features,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    SLICES: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """As `_skinny_kernel` with slices; all weights of the program wait in shared memory for x."""
    start_next(PDL)
    n, valid = _outputs(out_features, N, GATED)
    m = tl.arange(0, M)
    slices = tl.arange(0, SLICES)[:, None, None] * (BK // SLICES)
    rows = weight + n.to(tl.int64)[None, :, None] * K
    weights = ()
    for at in tl.static_range(0, K, BK):
        depth = at + slices + tl.arange(0, BK // SLICES)[None, None, :]
        mask = valid[None, :, None] & (depth < K)
        weights = weights + (tl.load(rows + depth, mask=mask, other=0.0),)
    wait_previous(PDL)
    values = ()
    for at in tl.static_range(0, K, BK):
        # Loaded as the product takes it: a transposition would cost a barrier for each piece.
        depth = at + slices + tl.arange(0, BK // SLICES)[None, :, None]
        mask = (m < count)[None, None, :] & (depth < K)
        x_at = x + m[None, None, :] * x_stride + depth
        values = values + (tl.load(x_at, mask=mask, other=0.0),)
    totals = tl.zeros((SLICES, N, M), tl.float32)
    for i in tl.static_range((K + BK - 1) // BK):
        totals = tl.dot(weights[i], values[i], acc=totals, input_precision="ieee")
    total = tl.sum(totals, axis=0)
    if BIAS:
        total += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[:, None]
    _store(out, total, count, out_features, M, N, GATED)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: tuning.LinearTile | None = None
) -> Tensor:
    """x [T, in], weight [out, in], bias [out] -> [T, out]."""
    tile = tile or _find_tile(x, weight, gated=False)
    if tile is None:
        return F.linear(x, weight, bias)
    return _launch(x, weight, bias, tile, gated=False)


def silu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: tuning.LinearTile | None = None
) -> Tensor | None:
    """silu(gate) * up of the linear layer's output, gate then up: x [T, in] -> [T, out / 2].

    None where cuBLAS is the faster one for the product.
    """
    tile = tile or _find_tile(x, weight, gated=True)
    if tile is None:
        return None
    tile = replace(tile, outputs=max(tile.outputs, 2))
    return _launch(x, weight, bias, tile, gated=True)


def linear_parts(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: tuning.LinearTile | None = None
) -> Tensor | None:
    """Parts of a linear layer's sums over the depth: x [T, in] -> [parts, T, out] float32.

    For who reads them anyway and adds them up on the way, in order. None where a whole `linear` is
    the faster one.
    """
    tile = tile or tuning.parts_tile(len(x), *weight.shape, weight.dtype)
    if tile is None or not _can_run(tile, x, weight):
        return None
    return _launch(x, weight, bias, tile, gated=False)


def _find_tile(x: Tensor, weight: Tensor, *, gated: bool) -> tuning.LinearTile | None:
    """The table's tile if the device can run it."""
    tile = tuning.linear_tile(len(x), *weight.shape, weight.dtype, gated=gated)
    return tile if tile is not None and _can_run(tile, x, weight) else None


def _can_run(tile: tuning.LinearTile, x: Tensor, weight: Tensor) -> bool:
    if not weight.is_contiguous():
        return False
    if tile.rows < 8:
        return True
    depth, stages = (weight.shape[1], 1) if tile.stages == 0 else (tile.depth, tile.stages)
    stages += tile.early
    stage = (tile.outputs + tile.rows) * depth * weight.element_size()
    return stages_that_fit(stages, stage, x) == stages


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, tile: tuning.LinearTile, *, gated: bool
) -> Tensor:
    out_features, in_features = weight.shape
    width = out_features // 2 if gated else out_features
    x = x if x.stride(1) == 1 else x.contiguous()
    if tile.parts > 1:
        shape = (tile.parts, len(x), width)
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
    else:
        out = torch.empty((len(x), width), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out_features, tile.outputs), tile.parts)
    if gated:
        grid = (triton.cdiv(width, tile.outputs // 2), 1)
    arguments = (
        x, x.stride(0), weight, weight if bias is None else bias, out, len(x), out_features
    )  # fmt: skip
    shapes = {
        "K": in_features, "BIAS": bias is not None, "M": tile.rows, "N": tile.outputs,
        "BK": tile.depth, "GATED": gated, "num_warps": tile.warps,
        "num_stages": max(tile.stages, 1), **overlapped(x),
    }  # fmt: skip
    if tile.rows < 8:
        _gemv_kernel[grid](*arguments, **shapes)
    elif tile.stages == 0:
        _held_kernel[grid](*arguments, SLICES=tile.slices, **shapes)
    else:
        steps = triton.cdiv(in_features, tile.depth * tile.parts)
        _skinny_kernel[grid](
            *arguments, SLICES=tile.slices, EARLY=min(tile.early, steps), PARTS=tile.parts, **shapes
        )  # fmt: skip
    return out
