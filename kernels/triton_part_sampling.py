# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Drawing token ids for few rows: several programs a row, each with a part of it in registers.

The search is that of `triton_sampling`, eight parts of what is left a pass; after each pass the
row's programs tell each other their sums through memory, all of them running at once (a cooperative
launch). Weights are added as integers, multiples of 2^-44 of the largest: sums are exact, so a draw
does not depend on the number of parts.

Knows nothing of requests; `reference_sampling` says what is drawn.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference_sampling import LEAST_TEMPERATURE

WAYS = tl.constexpr(8)
"""Parts that a pass of the search leaves one of."""
UNIT = tl.constexpr(float(1 << 44))
NOWHERE = tl.constexpr(2147483647)
PASSES = 12
"""Most passes of a search: 2^30 floats, 8 parts a pass, and the rounding of a part's width."""
LEAST_PART, MOST_PART = 2048, 8192
"""Logits of a part, as powers of two."""
MOST_VOCAB = 1 << 18
"""So many weights of 1 add up to 2^62."""


@triton.jit
def _gather(counter, PARTS: tl.constexpr):
    """Waits until all programs of the row have come here, and what they stored can be read."""
    tl.debug_barrier()  # a scalar is stored by one thread and read by all
    if PARTS > 1:
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        goal = (before // PARTS + 1) * PARTS
        while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < goal:
            pass
        tl.debug_barrier()


@triton.jit
def _threshold(
    w,
    amount,
    board,
    counter,
    goal,
    SHARE: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """The smallest float in 0 .. 1 such that less than `goal` of `amount` belongs to weights above.

    With SHARE the goal is that share of all. w, amount [N] of this part; board [*, WAYS, SPREAD]
    int64, which the search consumes -> (threshold, what is left of board).
    """
    low = tl.full((), -1, tl.int32)
    high = tl.full((), 0x3F800000, tl.int32)  # 1.0
    way = tl.arange(0, WAYS)
    spread = tl.arange(0, SPREAD)
    part = tl.program_id(0)
    while high - low > 1:
        step = tl.maximum((high - low) // WAYS, 1)
        bounds = tl.minimum(low + way * step, high)
        # The first is not asked about; all belongs above it.
        floats = tl.where(way == 0, -1.0, bounds.to(tl.float32, bitcast=True))
        above = tl.where(w[None, :] > floats[:, None], amount[None, :], 0)
        tl.store(board + way * SPREAD + part, tl.sum(above, axis=1))
        _gather(counter, PARTS)
        places = board + way[:, None] * SPREAD + spread[None, :]
        sums = tl.load(places, mask=(spread < PARTS)[None, :] & (way >= 0)[:, None], other=0,
                       volatile=True)  # fmt: skip
        totals = tl.sum(sums, axis=1)
        most = goal
        if SHARE:
            whole = tl.sum(tl.where(way == 0, totals, 0), axis=0)
            most = goal * whole.to(tl.float64)
        below = (way > 0) & (totals.to(tl.float64) < most)
        new_high = tl.min(tl.where(below, bounds, high), axis=0)
        low = tl.max(tl.where(below, low, bounds), axis=0)
        high = new_high
        board += WAYS * SPREAD
    return high.to(tl.float32, bitcast=True), board


@triton.jit
def part_sample_kernel(
    logits,
    stride,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    numbers,
    boards,
    board_size,
    peaks,
    counters,
    ids,
    vocab,
    COLDEST: tl.constexpr,
    PARTS: tl.constexpr,
    SPREAD: tl.constexpr,
    N: tl.constexpr,
):
    """One part of one row. boards [rows, board_size], peaks [rows, 2, SPREAD] float32 and int32
    bits, counters [rows] int64, a multiple of PARTS.
    """
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    counter = counters + row
    board = boards + row * board_size
    column = part * N + tl.arange(0, N)
    inside = column < vocab
    x = tl.load(logits + row * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    # NaN counts as infinity, which is no peak to draw from either.
    x = tl.where(x == x, x, float("inf"))
    best = tl.max(x, axis=0)
    first = tl.min(tl.where((x == best) & inside, column, NOWHERE), axis=0)
    peak_at = peaks + row * 2 * SPREAD
    tl.store(peak_at + part, best)
    tl.store(peak_at + SPREAD + part, first.to(tl.float32, bitcast=True))
    _gather(counter, PARTS)
    spread = tl.arange(0, SPREAD)
    there = spread < PARTS
    bests = tl.load(peak_at + spread, mask=there, other=float("-inf"), volatile=True)
    firsts = tl.load(peak_at + SPREAD + spread, mask=there, other=0.0, volatile=True)
    peak = tl.max(bests, axis=0)
    greedy = tl.min(
        tl.where((bests == peak) & there, firsts.to(tl.int32, bitcast=True), NOWHERE), axis=0
    )
    finite = (peak > float("-inf")) & (peak < float("inf"))
    temperature = tl.load(temperatures + row).to(tl.float32)
    # The same for all programs of a row, which so meet as often as each other.
    if finite & (temperature > 0.0):
        w = tl.exp((x - peak) / tl.maximum(temperature, COLDEST))
        # The largest weight is 1.
        least = tl.load(min_ps + row).to(tl.float32)
        w = tl.where(inside & (w >= least), w, 0.0)
        amount = (w * UNIT).to(tl.int64)
        top_k = tl.load(top_ks + row)
        if (top_k > 0) & (top_k < vocab):
            ones = tl.where(w > 0.0, 1, 0).to(tl.int64)
            goal = top_k.to(tl.float64)
            bound, board = _threshold(w, ones, board, counter, goal, False, PARTS, SPREAD)
            w = tl.where(w >= bound, w, 0.0)
            amount = tl.where(w >= bound, amount, 0)
        top_p = tl.load(top_ps + row).to(tl.float32)
        if top_p < 1.0:
            goal = top_p.to(tl.float64)
            bound, board = _threshold(w, amount, board, counter, goal, True, PARTS, SPREAD)
            amount = tl.where(w >= bound, amount, 0)
        own = tl.sum(amount, axis=0)
        tl.store(board + part, own)
        _gather(counter, PARTS)
        sums = tl.load(board + spread, mask=there, other=0, volatile=True)
        whole = tl.sum(sums, axis=0)
        passed = tl.sum(tl.where(spread < part, sums, 0), axis=0)
        goal = (tl.load(numbers + row) * whole.to(tl.float64)).to(tl.int64)
        # The product may round up to the total: the last token with any weight, then.
        goal = tl.minimum(goal, whole - 1)
        if (passed <= goal) & (goal < passed + own):
            beyond = passed + tl.cumsum(amount, axis=0) > goal
            place = tl.min(tl.where(beyond & (amount > 0), column, NOWHERE), axis=0)
            tl.store(ids + row, place.to(tl.int64))
    elif part == 0:
        tl.store(ids + row, tl.where(finite, greedy, -1).to(tl.int64))


def parts_of(logits: Tensor) -> int:
    """Into how many parts `sample` would cut each row; 0 where rows are too many or too long."""
    rows, vocab = logits.shape
    most = _programs(logits.device) // max(rows, 1)
    if most == 0 or vocab > MOST_VOCAB:
        return 0
    width = max(LEAST_PART, triton.next_power_of_2(triton.cdiv(vocab, most)))
    return triton.cdiv(vocab, width) if width <= MOST_PART else 0


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    u: Tensor,
    parts: int,
) -> Tensor:
    """See `Ops.sample`. logits [N, V], the last axis contiguous."""
    rows, vocab = logits.shape
    device = logits.device
    width = triton.next_power_of_2(triton.cdiv(vocab, parts))
    parts = triton.cdiv(vocab, width)
    spread = triton.next_power_of_2(parts)
    size = (2 * PASSES + 1) * WAYS.value * spread
    boards = torch.empty((rows, size), dtype=torch.int64, device=device)
    peaks = torch.empty((rows, 2 * spread), dtype=torch.float32, device=device)
    ids = torch.empty(rows, dtype=torch.int64, device=device)
    counters = _counters(device, parts) if parts > 1 else ids
    part_sample_kernel[(parts, rows)](
        logits, logits.stride(0), temperature, top_k, top_p, min_p, u, boards, size, peaks,
        counters, ids, vocab, COLDEST=LEAST_TEMPERATURE, PARTS=parts, SPREAD=spread, N=width,
        num_warps=max(4, min(16, width // 256)), launch_cooperative_grid=parts > 1,
    )  # fmt: skip
    return ids


@lru_cache(maxsize=64)
def _programs(device: torch.device) -> int:
    """Programs that run at the same time for certain."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _counters(device: torch.device, parts: int) -> Tensor:
    """How often programs of a row have met, for launches of so many parts: on a stream they come
    one after the other, and each leaves multiples of `parts`.
    """
    if torch.cuda.is_current_stream_capturing():
        # A graph may be replayed on any stream.
        return torch.zeros(_programs(device), dtype=torch.int64, device=device)
    return _stream_counters(device, torch.cuda.current_stream(device).cuda_stream, parts)


@lru_cache(maxsize=256)
def _stream_counters(device: torch.device, stream: int, parts: int) -> Tensor:
    del stream, parts  # what tells the counters apart
    return torch.zeros(_programs(device), dtype=torch.int64, device=device)
