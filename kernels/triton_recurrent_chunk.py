# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Longer runs of a linear recurrence, 16 rows at a time, in two launches.

What a chunk's rows are to each other does not depend on the state: `_relate_kernel` finds it for
all chunks at once, in the form in which the corrections of the delta rule come from one triangular
system. `_walk_kernel` then walks over each sequence's chunks with a part of the state in registers.

Chunks begin at a sequence's first row of the step. Between the two launches, chunk c of sequence s
lies in place `offsets[s] // 16 + s + c`, which no other chunk shares. Knows nothing of gated norms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from .triton_launch import overlapped, start_next, wait_previous
from .triton_recurrent_step import INDICES, silu, softplus, vectors

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import FlatBatch

CHUNK = 16
"""Rows of a chunk: the least that matrix units take, and a power of two for `_inverse`."""

RECORD = 2 * CHUNK * CHUNK + 4 * CHUNK
"""Numbers between the launches, of a chunk and head: see `_relate_kernel`."""


@triton.jit
def _inverse(lower, C: tl.constexpr):
    """(1 + lower)^-1 of a strictly lower triangular [16, 16].

    lower^16 is zero, so the inverse is (1 - lower)(1 + lower^2)(1 + lower^4)(1 + lower^8). Where
    keys repeat, the powers are large and cancel; one Newton step takes out what rounding left.
    """
    m = tl.arange(0, C)
    one = tl.where(m[:, None] == m[None, :], 1.0, 0.0)
    second = tl.dot(lower, lower, input_precision="ieee")
    fourth = tl.dot(second, second, input_precision="ieee")
    eighth = tl.dot(fourth, fourth, input_precision="ieee")
    y = one - lower
    y += tl.dot(y, second, input_precision="ieee")
    y += tl.dot(y, fourth, input_precision="ieee")
    y += tl.dot(y, eighth, input_precision="ieee")
    rest = one - y - tl.dot(lower, y, input_precision="ieee")
    return y + tl.dot(y, rest, input_precision="ieee")


@triton.jit(do_not_specialize=["seqs"], do_not_specialize_on_alignment=INDICES)
def _relate_kernel(
    x,
    x_stride,
    b,
    b_stride,
    a,
    a_stride,
    rate,
    dt_bias,
    records,
    offsets,
    seqs,
    Q_AT: tl.constexpr,
    K_AT: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    DELTA: tl.constexpr,
    SILU_Q: tl.constexpr,
    SILU_K: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    KP: tl.constexpr,
    SP: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One chunk, one head -> its record in `records` [places, HEADS, SIZE] float32:

    [C, C] from values less what the state knows of them to corrections (delta rule alone);
    [C, C] from corrections to what later rows read of them;
    [C] of each row: factor of k and of q where they read the state, factor of k where it is
    written, and SSD's step of the values, or what the whole chunk leaves of the state.
    """
    start_next(PDL)
    place = tl.program_id(0)
    head = tl.program_id(1)
    m = tl.arange(0, C)
    i = tl.arange(0, KP)
    head_rate = tl.load(rate + head)
    head_bias = tl.load(dt_bias + head)
    wait_previous(PDL)
    s = tl.arange(0, SP)
    firsts = tl.load(offsets + s, mask=s < seqs, other=0)
    seq = tl.sum(((s < seqs) & (firsts // C + s <= place)).to(tl.int32), axis=0) - 1
    first = tl.load(offsets + seq)
    at = (place - first // C - seq) * C
    rows = tl.load(offsets + seq + 1) - first
    if at < rows:
        row = (first + at + m).to(tl.int64)
        keep = at + m < rows
        line = x + row[:, None] * x_stride
        key = ((head // GROUP) * K + i)[None, :]
        keys = keep[:, None] & (i < K)[None, :]
        q = vectors(line + Q_AT, key, keys, SILU_Q)
        k = vectors(line + K_AT, key, keys, SILU_K)
        raw = tl.load(a + row * a_stride + head, mask=keep, other=0.0).to(tl.float32)
        soft = softplus(raw + head_bias)
        total = tl.cumsum(tl.where(keep, head_rate * soft, 0.0), axis=0)
        at_or_after = m[:, None] >= m[None, :]
        gap = tl.where(at_or_after, total[:, None] - total[None, :], 0.0)
        left = tl.where(at_or_after, tl.exp(gap), 0.0)
        end = tl.sum(tl.where(m == C - 1, total, 0.0), axis=0)
        k_factor = tl.full((C,), 1.0, tl.float32)
        q_factor = tl.full((C,), 1.0, tl.float32)
        record = records + (place.to(tl.int64) * HEADS + head) * SIZE
        tile = m[:, None] * C + m[None, :]
        if DELTA:
            k_factor = tl.rsqrt(tl.sum(k * k, axis=1) + 1e-6)
            q_factor = tl.rsqrt(tl.sum(q * q, axis=1) + 1e-6) * SCALE
            k *= k_factor[:, None]
            q *= q_factor[:, None]
            raw = tl.load(b + row * b_stride + head, mask=keep, other=0.0).to(tl.float32)
            beta = tl.where(keep, tl.sigmoid(raw), 0.0)
            alike = tl.dot(k, tl.trans(k), input_precision=PRECISION)
            lower = tl.where(m[:, None] > m[None, :], left * alike, 0.0) * beta[:, None]
            tl.store(record + tile, _inverse(lower, C) * beta[None, :])
        seen = left * tl.dot(q, tl.trans(k), input_precision=PRECISION)
        tl.store(record + C * C + tile, seen)
        since = tl.exp(total)
        each = record + 2 * C * C + m
        tl.store(each, k_factor * since)
        tl.store(each + C, q_factor * since)
        tl.store(each + 2 * C, k_factor * tl.exp(end - total))
        tl.store(each + 3 * C, tl.where(keep, soft, 0.0) if not DELTA else since)


@triton.jit
def _load_chunk(
    x,
    x_stride,
    record,
    first,
    at,
    rows,
    key,
    inside_k,
    column,
    inside_v,
    Q_AT: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    DELTA: tl.constexpr,
    C: tl.constexpr,
):
    """What a chunk is made of, as it lies in memory -> (q, k, v, record's parts)."""
    m = tl.arange(0, C)
    keep = at + m < rows
    line = x + (first + at + m).to(tl.int64)[:, None] * x_stride
    keys = keep[:, None] & inside_k[None, :]
    q = tl.load(line + Q_AT + key[None, :], mask=keys, other=0.0)
    k = tl.load(line + K_AT + key[None, :], mask=keys, other=0.0)
    v = tl.load(line + V_AT + column[None, :], mask=keep[:, None] & inside_v[None, :], other=0.0)
    there = at < rows
    tile = m[:, None] * C + m[None, :]
    solved = tl.zeros((C, C), tl.float32)
    if DELTA:
        solved = tl.load(record + tile, mask=there & (tile >= 0), other=0.0)
    seen = tl.load(record + C * C + tile, mask=there & (tile >= 0), other=0.0)
    each = record + 2 * C * C + m
    k_reads = tl.load(each, mask=there & (m >= 0), other=0.0)
    q_reads = tl.load(each + C, mask=there & (m >= 0), other=0.0)
    k_writes = tl.load(each + 2 * C, mask=there & (m >= 0), other=0.0)
    last = tl.load(each + 3 * C, mask=there & (m >= 0), other=0.0)
    return q, k, v, solved, seen, k_reads, q_reads, k_writes, last


@triton.jit(do_not_specialize_on_alignment=INDICES)
def _walk_kernel(
    x,
    x_stride,
    gate,
    gate_stride,
    skip,
    state,
    records,
    out,
    starts,
    offsets,
    slots,
    Q_AT: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DELTA: tl.constexpr,
    SILU_Q: tl.constexpr,
    SILU_K: tl.constexpr,
    SILU_V: tl.constexpr,
    PRECISION: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    """All rows of a sequence, one head, N channels of V. Writes o, or SSD's gated y, in float32.

    The next chunk is on its way while one is worked on.
    """
    start_next(PDL)
    j = tl.program_id(0) * N + tl.arange(0, N)
    head = tl.program_id(1)
    seq = tl.program_id(2)
    i = tl.arange(0, KP)
    m = tl.arange(0, C)
    wait_previous(PDL)
    first = tl.load(offsets + seq)
    rows = tl.load(offsets + seq + 1) - first
    if rows > 0:
        has_past = tl.load(starts + seq) > 0
        slot = tl.load(slots + seq).to(tl.int64)
        inside = (i < K)[:, None] & (j < V)[None, :]
        place = state + (slot * HEADS + head) * (K * V) + i[:, None] * V + j[None, :]
        s = tl.load(place, mask=inside & has_past, other=0.0)
        key = (head // GROUP) * K + i
        column = head * V + j
        record = records + ((first // C + seq).to(tl.int64) * HEADS + head) * SIZE
        if not DELTA:
            head_skip = tl.load(skip + head)
        q, k, v, solved, seen, k_reads, q_reads, k_writes, last = _load_chunk(
            x, x_stride, record, first, 0, rows, key, i < K, column, j < V,
            Q_AT, K_AT, V_AT, DELTA, C,
        )  # fmt: skip
        for at in range(0, rows, C):
            record += HEADS * SIZE
            next_q, next_k, next_v, next_solved, next_seen, next_kr, next_qr, next_kw, next_last = (
                _load_chunk(
                    x, x_stride, record, first, at + C, rows, key, i < K, column, j < V,
                    Q_AT, K_AT, V_AT, DELTA, C,
                )
            )  # fmt: skip
            queries = q.to(tl.float32)
            keys = k.to(tl.float32)
            value = v.to(tl.float32)
            if SILU_Q:
                queries = silu(queries)
            if SILU_K:
                keys = silu(keys)
            if SILU_V:
                value = silu(value)
            if DELTA:
                known = tl.dot(keys, s, input_precision=PRECISION) * k_reads[:, None]
                u = tl.dot(solved, value - known, input_precision="ieee")
                whole = last
            else:
                u = value * last[:, None]
                whole = k_reads
            o = tl.dot(queries, s, input_precision=PRECISION) * q_reads[:, None]
            o += tl.dot(seen, u, input_precision=PRECISION)
            decay = tl.sum(tl.where(m == C - 1, whole, 0.0), axis=0)
            written = tl.trans(keys * k_writes[:, None])
            s = s * decay + tl.dot(written, u, input_precision=PRECISION)
            row = (first + at + m).to(tl.int64)
            here = (at + m < rows)[:, None] & (j < V)[None, :]
            if not DELTA:
                there = gate + row[:, None] * gate_stride + column[None, :]
                gates = silu(tl.load(there, mask=here, other=0.0).to(tl.float32))
                o = (o + head_skip * value) * gates
            tl.store(out + (row[:, None] * HEADS + head) * V + j[None, :], o, mask=here)
            q, k, v, solved, seen = next_q, next_k, next_v, next_solved, next_seen
            k_reads, q_reads, k_writes, last = next_kr, next_qr, next_kw, next_last
        tl.store(place, s, mask=inside)


def walk(
    shape: dict[str, Any],
    x: Tensor,
    gate: Tensor,
    scalars: tuple[Tensor, ...],
    state: Tensor,
    batch: FlatBatch,
    tile: tuple[int, int],
) -> Tensor:
    """The recurrence over a flat batch; `state` is left after each sequence's last row.

    Args:
        shape: the constants that both kernels share.
        scalars: b, a, rate, dt_bias, skip.
        tile: (channels of V of a program of the walk, warps).

    Returns:
        o, or SSD's gated y [T, heads * value_dim] float32; padding rows are left unwritten.
    """
    _, heads, key_dim, value_dim = state.shape
    b, a, rate, dt_bias, skip = scalars
    seqs, count = len(batch.starts), len(x)
    places = count // CHUNK + seqs
    records = torch.empty((places + 1, heads, RECORD), dtype=torch.float32, device=x.device)
    common = {
        "KP": max(16, triton.next_power_of_2(key_dim)), "C": CHUNK, "SIZE": RECORD,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32", **overlapped(x),
    }  # fmt: skip
    wanted = ("Q_AT", "K_AT", "GROUP", "HEADS", "K", "DELTA", "SILU_Q", "SILU_K", "SCALE")
    _relate_kernel[(places, heads)](
        x, x.stride(0), b, b.stride(0), a, a.stride(0), rate, dt_bias, records, batch.offsets,
        seqs, **{name: shape[name] for name in wanted}, SP=triton.next_power_of_2(seqs),
        num_warps=4, **common,
    )  # fmt: skip
    out = torch.empty((count, heads * value_dim), dtype=torch.float32, device=x.device)
    block, warps = tile
    _walk_kernel[(triton.cdiv(value_dim, block), heads, seqs)](
        x, x.stride(0), gate, gate.stride(0), skip, state, records, out, batch.starts,
        batch.offsets, batch.slots, **{k: v for k, v in shape.items() if k != "SCALE"}, N=block,
        num_warps=warps, num_stages=1, **common,
    )  # fmt: skip
    return out
