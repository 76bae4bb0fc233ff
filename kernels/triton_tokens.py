# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""Token ids in and out: what the step before chose, the embedding gather, the greedy choice over
logits, and where it is kept.

Knows nothing of sampling parameters or of sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import overlapped, start_next, wait_previous

if TYPE_CHECKING:
    from .batch import FlatBatch

PART = 8192
"""Logits that one program looks at."""

ROWS = 128
"""Token rows that one program looks at."""


@triton.jit
def _embed_kernel(
    ids, table, table_stride, out, vocab, H: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr
):
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    token = tl.load(ids + row)
    known = (token >= 0) & (token < vocab)
    mask = (column < H) & known
    value = tl.load(table + tl.where(known, token, 0) * table_stride + column, mask=mask, other=0.0)
    tl.store(out + row * H + column, value, mask=column < H)


@triton.jit(do_not_specialize=["count"])
def _fed_kernel(ids, last, slots, row_seq, out, count, N: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    row = tl.program_id(0) * N + tl.arange(0, N)
    inside = row < count
    token = tl.load(ids + row, mask=inside, other=0)
    slot = tl.load(slots + tl.load(row_seq + row, mask=inside, other=0), mask=inside, other=0)
    wait_previous(PDL)
    fed = tl.load(last + slot, mask=inside & (token < 0), other=0)
    tl.store(out + row, tl.maximum(tl.where(token < 0, fed, token), 0), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _keep_kernel(
    ids, rows, last, slots, row_seq, offsets, count, N: tl.constexpr, PDL: tl.constexpr
):
    start_next(PDL)
    i = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.load(rows + i, mask=i < count, other=-1)
    inside = row >= 0  # a batch of nobody asks for the row before its first
    seq = tl.load(row_seq + row, mask=inside, other=0)
    slot = tl.load(slots + seq, mask=inside, other=0)
    is_last = tl.load(offsets + seq + 1, mask=inside, other=0) - 1 == row
    wait_previous(PDL)
    token = tl.load(ids + i, mask=inside, other=0)
    tl.store(last + slot, token, mask=inside & is_last)


@triton.jit
def _part_best_kernel(
    logits,
    stride,
    best_out,
    at_out,
    vocab,
    PARTS: tl.constexpr,
    N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The best logit of one part of a row and its first place; NaN counts as infinity."""
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    column = part * N + tl.arange(0, N)
    inside = column < vocab
    value = tl.load(logits + row * stride + column, mask=inside, other=float("-inf"))
    value = value.to(tl.float32)
    value = tl.where(value == value, value, float("inf"))
    best = tl.max(value, axis=0)
    at = tl.min(tl.where((value == best) & inside, column, 2147483647), axis=0)
    tl.store(best_out + row * PARTS + part, best)
    tl.store(at_out + row * PARTS + part, at)


@triton.jit
def _row_best_kernel(best_in, at_in, ids, PARTS: tl.constexpr, N: tl.constexpr, PDL: tl.constexpr):
    start_next(PDL)
    wait_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, N)
    value = tl.load(best_in + row * PARTS + part, mask=part < PARTS, other=float("-inf"))
    at = tl.load(at_in + row * PARTS + part, mask=part < PARTS, other=2147483647)
    best = tl.max(value, axis=0)
    first = tl.min(tl.where(value == best, at, 2147483647), axis=0)
    finite = (best > float("-inf")) & (best < float("inf"))
    tl.store(ids + row, tl.where(finite, first, -1).to(tl.int64))


def fed_tokens(token_ids: Tensor, last: Tensor, batch: FlatBatch) -> Tensor:
    """See `TokenOps.fed_tokens`."""
    count, out = len(token_ids), torch.empty_like(token_ids)
    _fed_kernel[(triton.cdiv(count, ROWS),)](
        token_ids,
        last,
        batch.slots,
        batch.row_seq,
        out,
        count,
        N=ROWS,
        num_warps=4,
        **overlapped(last),
    )
    return out


def keep_tokens(ids: Tensor, rows: Tensor, last: Tensor, batch: FlatBatch) -> None:
    """See `TokenOps.keep_tokens`; nothing is written to slot 0 but by its owners, nobody."""
    if not len(ids):
        return
    _keep_kernel[(triton.cdiv(len(ids), ROWS),)](
        ids,
        rows,
        last,
        batch.slots,
        batch.row_seq,
        batch.offsets,
        len(ids),
        N=ROWS,
        num_warps=4,
        **overlapped(last),
    )


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """See `TokenOps.embed`; an id outside the table (a row that belongs to nobody) gives zeros."""
    vocab, width = table.shape
    table = table if table.stride(1) == 1 else table.contiguous()
    out = torch.empty((len(token_ids), width), dtype=table.dtype, device=table.device)
    if width == 0:  # the rope of a model without attention
        return out
    block = min(1024, triton.next_power_of_2(width))
    _embed_kernel[(len(token_ids), triton.cdiv(width, block))](
        token_ids,
        table,
        table.stride(0),
        out,
        vocab,
        H=width,
        N=block,
        num_warps=4,
        **overlapped(table),
    )
    return out


def argmax(logits: Tensor) -> Tensor:
    """See `TokenOps.argmax`."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    block = min(PART, triton.next_power_of_2(vocab))
    parts = triton.cdiv(vocab, block)
    best = torch.empty((rows, parts), dtype=torch.float32, device=logits.device)
    at = torch.empty((rows, parts), dtype=torch.int32, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _part_best_kernel[(parts, rows)](
        logits,
        logits.stride(0),
        best,
        at,
        vocab,
        PARTS=parts,
        N=block,
        num_warps=8,
        **overlapped(logits),
    )
    _row_best_kernel[(rows,)](
        best,
        at,
        ids,
        PARTS=parts,
        N=triton.next_power_of_2(parts),
        num_warps=1,
        **overlapped(logits),
    )
    return ids
