# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Drawing token ids without a sort: one program a row, thresholds found by search. For few rows
`triton_part_sampling` does the same with many programs.

top-k and top-p keep the tokens at least as probable as some threshold, and how much lies above a
threshold only falls as it rises: so the threshold is searched for among the float numbers, four
parts of what is left a pass, each pass one read of the row's weights (from L2).

Knows nothing of requests; `reference_sampling` says what is drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_part_sampling
from .reference_sampling import LEAST_TEMPERATURE
from .triton_launch import overlapped, start_next, wait_previous


@triton.jit
def _threshold(weights, goal, least, vocab, COUNT: tl.constexpr, N: tl.constexpr):
    """The smallest float such that less than `goal` exceeds it: of the sum of the weights from
    `least` on, or of their number. Weights are in 0 .. 1, and so is the float.
    """
    low = tl.full((), -1, tl.int32)
    high = tl.full((), 0x3F800000, tl.int32)  # 1.0
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        first = low + step
        second = tl.minimum(first + step, high)
        third = tl.minimum(second + step, high)
        first_bound = first.to(tl.float32, bitcast=True)
        second_bound = second.to(tl.float32, bitcast=True)
        third_bound = third.to(tl.float32, bitcast=True)
        total_first = tl.zeros((N,), tl.float32)
        total_second = tl.zeros((N,), tl.float32)
        total_third = tl.zeros((N,), tl.float32)
        for at in range(0, vocab, N):
            column = at + tl.arange(0, N)
            w = tl.load(weights + column, mask=column < vocab, other=0.0)
            w = tl.where(w >= least, w, 0.0)
            part = w
            if COUNT:
                part = tl.where(w > 0.0, 1.0, 0.0)
            total_first += tl.where(w > first_bound, part, 0.0)
            total_second += tl.where(w > second_bound, part, 0.0)
            total_third += tl.where(w > third_bound, part, 0.0)
        below_first = tl.sum(total_first, axis=0) < goal
        below_second = tl.sum(total_second, axis=0) < goal
        below_third = tl.sum(total_third, axis=0) < goal
        beside = tl.where(below_second, first, tl.where(below_third, second, third))
        low = tl.where(below_first, low, beside)
        beside = tl.where(below_second, second, tl.where(below_third, third, high))
        high = tl.where(below_first, first, beside)
    return high.to(tl.float32, bitcast=True)


@triton.jit
def _sample_kernel(
    logits,
    stride,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    numbers,
    weights_out,
    ids,
    vocab,
    COLDEST: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    weights = weights_out + row * vocab
    lane = tl.arange(0, N)
    peaks = tl.full((N,), float("-inf"), tl.float32)
    firsts = tl.zeros((N,), tl.int32)
    for at in range(0, vocab, N):
        x = tl.load(line + at + lane, mask=at + lane < vocab, other=float("-inf")).to(tl.float32)
        # NaN counts as infinity, which is no peak to draw from either.
        x = tl.where(x == x, x, float("inf"))
        firsts = tl.where(x > peaks, at + lane, firsts)
        peaks = tl.maximum(peaks, x)
    peak = tl.max(peaks, axis=0)
    chosen = tl.min(tl.where(peaks == peak, firsts, vocab), axis=0)
    temperature = tl.load(temperatures + row).to(tl.float32)
    finite = (peak > float("-inf")) & (peak < float("inf"))
    if finite & (temperature > 0.0):
        temperature = tl.maximum(temperature, COLDEST)
        for at in range(0, vocab, N):
            inside = at + lane < vocab
            x = tl.load(line + at + lane, mask=inside, other=float("-inf")).to(tl.float32)
            tl.store(weights + at + lane, tl.exp((x - peak) / temperature), mask=inside)
        tl.debug_barrier()
        # The largest weight is 1.
        least = tl.load(min_ps + row).to(tl.float32)
        top_k = tl.load(top_ks + row)
        if (top_k > 0) & (top_k < vocab):
            goal = top_k.to(tl.float32)
            least = tl.maximum(least, _threshold(weights, goal, least, vocab, True, N))
        top_p = tl.load(top_ps + row).to(tl.float32)
        if top_p < 1.0:
            goal = top_p * _sum(weights, least, vocab, N).to(tl.float32)
            least = tl.maximum(least, _threshold(weights, goal, least, vocab, False, N))
        goal = tl.load(numbers + row) * _sum(weights, least, vocab, N)
        passed = tl.zeros((), tl.float64)
        found = tl.full((), -1, tl.int32)
        lasts = tl.zeros((N,), tl.int32)
        for at in range(0, vocab, N):
            w = tl.load(weights + at + lane, mask=at + lane < vocab, other=0.0)
            w = tl.where(w >= least, w, 0.0).to(tl.float64)
            part = tl.sum(w, axis=0)
            if (found < 0) & (passed + part > goal):
                beyond = passed + tl.cumsum(w, axis=0) > goal
                # The two ways of adding may differ by a rounding: never past the part's end.
                place = tl.min(tl.where(beyond & (w > 0.0), at + lane, vocab), axis=0)
                found = tl.where(place < vocab, place, found)
            lasts = tl.where(w > 0.0, at + lane, lasts)
            passed += part
        chosen = tl.where(found >= 0, found, tl.max(lasts, axis=0))
    tl.store(ids + row, tl.where(finite, chosen, -1).to(tl.int64))


@triton.jit
def _sum(weights, least, vocab, N: tl.constexpr):
    """The weights from `least` on, in float64."""
    total = tl.zeros((N,), tl.float64)
    for at in range(0, vocab, N):
        column = at + tl.arange(0, N)
        w = tl.load(weights + column, mask=column < vocab, other=0.0)
        total += tl.where(w >= least, w, 0.0).to(tl.float64)
    return tl.sum(total, axis=0)


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    u: Tensor,
    parts: int | None = None,
) -> Tensor:
    """See `Ops.sample`. Few rows are spread over programs, unless `parts` is 0: that is the same
    sum, but for its rounding, whatever the number of rows.
    """
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    parts = triton_part_sampling.parts_of(logits) if parts is None else parts
    if parts:
        return triton_part_sampling.sample(logits, temperature, top_k, top_p, min_p, u, parts)
    weights = torch.empty((rows, vocab), dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    block = min(4096, triton.next_power_of_2(vocab))
    _sample_kernel[(rows,)](
        logits, logits.stride(0), temperature, top_k, top_p, min_p, u, weights, ids, vocab,
        COLDEST=LEAST_TEMPERATURE, N=block, num_warps=16 if block >= 4096 else 4,
        **overlapped(logits),
    )  # fmt: skip
    return ids
