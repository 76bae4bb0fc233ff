# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Mixture of SwiGLU experts: rows grouped by expert on the device, in launches of fixed size.

Pair `row * top_k + choice` is one row at one of its experts. Every expert lists its pairs; the two
products take blocks of at most M pairs of one expert, as many as the worst routing could need, and
a program whose block turns out not to exist ends at once. So nothing waits for the host to learn
how rows were routed. A row's experts are summed in the order of choice: results repeat bitwise.

Knows nothing of how the router's logits came about.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .triton_launch import overlapped, stages_that_fit, start_next, wait_previous


@triton.jit
def _route_kernel(
    logits,
    stride,
    experts_out,
    weights_out,
    E: tl.constexpr,
    TOP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    N: tl.constexpr,
    TP: tl.constexpr,
    PDL: tl.constexpr,
):
    """The TOP most probable experts of one row, best first, and their weights."""
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, N)
    score = tl.load(logits + row * stride + expert, mask=expert < E, other=float("-inf"))
    score = score.to(tl.float32)
    broken = score != score
    score = tl.where(broken, float("-inf"), score)
    peak = tl.max(score, axis=0)
    left = tl.exp(score - tl.where(peak == float("-inf"), 0.0, peak))
    # A broken row goes to some experts too, with weights that show it.
    total = tl.sum(tl.where(broken, float("nan"), left), axis=0)
    left = tl.where(expert < E, left, -1.0)
    choice = tl.arange(0, TP)
    chosen = tl.zeros((TP,), tl.int32)
    weights = tl.zeros((TP,), tl.float32)
    for i in tl.static_range(TOP):
        best = tl.max(left, axis=0)
        at = tl.min(tl.where(left == best, expert, N), axis=0)
        chosen = tl.where(choice == i, at, chosen)
        weights = tl.where(choice == i, best / total, weights)
        left = tl.where(expert == at, -1.0, left)
    if NORMALIZE:
        weights /= tl.sum(weights, axis=0)
    tl.store(experts_out + row * TOP + choice, chosen, mask=choice < TOP)
    tl.store(weights_out + row * TOP + choice, weights, mask=choice < TOP)


@triton.jit(do_not_specialize=["pairs", "rows"])
def _list_kernel(
    experts,
    pairs_out,
    counts_out,
    pairs,
    rows,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The pairs of one expert, ascending; at most one a row."""
    start_next(PDL)
    wait_previous(PDL)
    expert = tl.program_id(0)
    found = 0
    for at in range(0, pairs, N):
        pair = at + tl.arange(0, N)
        match = tl.load(experts + pair, mask=pair < pairs, other=-1) == expert
        place = found + tl.cumsum(match.to(tl.int32), axis=0) - 1
        tl.store(pairs_out + expert.to(tl.int64) * rows + place, pair, mask=match)
        found += tl.sum(match.to(tl.int32), axis=0)
    tl.store(counts_out + expert, found)


@triton.jit
def _block(counts, lists, rows, block, E: tl.constexpr, EP: tl.constexpr, M: tl.constexpr):
    """The block's expert and pairs -> (expert, pair [M], which pairs exist [M])."""
    expert = tl.arange(0, EP)
    count = tl.load(counts + expert, mask=expert < E, other=0)
    blocks = (count + M - 1) // M
    after = tl.cumsum(blocks, axis=0)
    mine = tl.sum((after <= block).to(tl.int32), axis=0)
    first = tl.sum(tl.where(expert == mine, after - blocks, 0), axis=0)
    live = tl.sum(tl.where(expert == mine, count, 0), axis=0)
    place = (block - first) * M + tl.arange(0, M)
    keep = place < live
    pair = tl.load(lists + mine.to(tl.int64) * rows + place, mask=keep, other=0)
    return mine, pair, keep


@triton.jit(do_not_specialize=["rows"])
def _gate_up_kernel(
    x,
    x_stride,
    weight,
    counts,
    lists,
    hidden,
    rows,
    H: tl.constexpr,
    INNER: tl.constexpr,
    TOP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """silu(x gate^T) * (x up^T) of one block, to hidden [pairs, INNER]."""
    start_next(PDL)
    wait_previous(PDL)
    expert, pair, keep = _block(counts, lists, rows, tl.program_id(1), E, EP, M)
    if expert < E:
        n = tl.program_id(0) * N + tl.arange(0, N)
        k = tl.arange(0, BK)
        inside = n < INNER
        line = x + (pair // TOP).to(tl.int64)[:, None] * x_stride + k[None, :]
        gate_at = weight + expert.to(tl.int64) * (2 * INNER * H) + n[:, None] * H + k[None, :]
        gate = tl.zeros((M, N), tl.float32)
        up = tl.zeros((M, N), tl.float32)
        for at in range(0, H, BK):
            there = (at + k < H)[None, :]
            value = tl.load(line + at, mask=keep[:, None] & there, other=0.0)
            w = tl.load(gate_at + at, mask=inside[:, None] & there, other=0.0)
            gate = tl.dot(value, tl.trans(w), acc=gate, input_precision="ieee")
            w = tl.load(gate_at + INNER * H + at, mask=inside[:, None] & there, other=0.0)
            up = tl.dot(value, tl.trans(w), acc=up, input_precision="ieee")
        y = gate * tl.sigmoid(gate) * up
        place = hidden + pair.to(tl.int64)[:, None] * INNER + n[None, :]
        tl.store(place, y.to(hidden.dtype.element_ty), mask=keep[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(
    hidden,
    weight,
    counts,
    lists,
    out,
    rows,
    H: tl.constexpr,
    INNER: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """hidden down^T of one block, to out [pairs, H]."""
    start_next(PDL)
    wait_previous(PDL)
    expert, pair, keep = _block(counts, lists, rows, tl.program_id(1), E, EP, M)
    if expert < E:
        n = tl.program_id(0) * N + tl.arange(0, N)
        k = tl.arange(0, BK)
        inside = n < H
        line = hidden + pair.to(tl.int64)[:, None] * INNER + k[None, :]
        w_at = weight + expert.to(tl.int64) * (H * INNER) + n[:, None] * INNER + k[None, :]
        total = tl.zeros((M, N), tl.float32)
        for at in range(0, INNER, BK):
            there = (at + k < INNER)[None, :]
            value = tl.load(line + at, mask=keep[:, None] & there, other=0.0)
            w = tl.load(w_at + at, mask=inside[:, None] & there, other=0.0)
            total = tl.dot(value, tl.trans(w), acc=total, input_precision="ieee")
        place = out + pair.to(tl.int64)[:, None] * H + n[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=keep[:, None] & inside[None, :])


@triton.jit
def _sum_kernel(
    parts,
    weights,
    out,
    H: tl.constexpr,
    TOP: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    valid = column < H
    total = tl.zeros((N,), tl.float32)
    for i in tl.static_range(TOP):
        pair = row * TOP + i
        value = tl.load(parts + pair * H + column, mask=valid, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * value
    tl.store(out + row * H + column, total.to(out.dtype.element_ty), mask=valid)


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalize: bool,
    tile: tuning.ExpertTile | None = None,
) -> Tensor:
    """See `Ops.moe`. Of experts equally probable the first is chosen."""
    rows, width = x.shape
    experts, inner = len(gate_up), down.shape[2]
    x = x if x.stride(1) == 1 else x.contiguous()
    pairs = rows * top_k
    tile = tile or tuning.expert_tile(x.element_size(), pairs, experts)
    stage = (tile.rows + 2 * tile.outputs) * tile.depth * x.element_size()
    stages = stages_that_fit(tile.stages, stage, x)
    blocks = pairs // tile.rows + min(experts, pairs)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    chosen, weights = empty(pairs, dtype=torch.int32), empty(pairs, dtype=torch.float32)
    lists, counts = empty(experts, rows, dtype=torch.int32), empty(experts, dtype=torch.int32)
    hidden, parts = empty(pairs, inner, dtype=x.dtype), empty(pairs, width, dtype=x.dtype)
    out = empty(rows, width, dtype=x.dtype)
    options = overlapped(x)
    _route_kernel[(rows,)](
        router_logits, router_logits.stride(0), chosen, weights, E=experts, TOP=top_k,
        NORMALIZE=normalize, N=triton.next_power_of_2(experts),
        TP=triton.next_power_of_2(top_k), num_warps=1, **options,
    )  # fmt: skip
    _list_kernel[(experts,)](
        chosen, lists, counts, pairs, rows, N=min(1024, triton.next_power_of_2(pairs)),
        num_warps=4, **options,
    )  # fmt: skip
    shapes = {
        "H": width, "INNER": inner, "E": experts, "EP": triton.next_power_of_2(experts),
        "M": tile.rows, "N": tile.outputs, "BK": tile.depth, "num_warps": tile.warps,
        "num_stages": max(stages, 1), **options,
    }  # fmt: skip
    _gate_up_kernel[(triton.cdiv(inner, tile.outputs), blocks)](
        x, x.stride(0), gate_up.contiguous(), counts, lists, hidden, rows, TOP=top_k, **shapes
    )
    _down_kernel[(triton.cdiv(width, tile.outputs), blocks)](
        hidden, down.contiguous(), counts, lists, parts, rows, **shapes
    )
    block = min(1024, triton.next_power_of_2(width))
    _sum_kernel[(rows, triton.cdiv(width, block))](
        parts, weights, out, H=width, TOP=top_k, N=block, num_warps=4, **options
    )
    return out
