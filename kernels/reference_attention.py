"""Causal attention over a paged KV cache, and the store into its pages.

Pages are [pages, kv heads, page_size, head_dim] per layer. Rows of one-token sequences are taken
together; longer runs one sequence at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .batch import FlatBatch


def store_kv(x: Tensor, pages: Tensor, batch: FlatBatch) -> None:
    """Writes x [T, Hkv, d] to `batch.kv_rows` of pages [pages, Hkv, page_size, d]."""
    page_size = pages.shape[2]
    rows, destinations = batch.kv_write
    pages[destinations // page_size, :, destinations % page_size] = x if rows is None else x[rows]


def attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    batch: FlatBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """See `Ops.attention`."""
    assert batch.spans is not None, "the reference needs the host copy of the batch's spans"
    if batch.is_decode:
        ends = batch.starts.long() + 1
        return _decode(q, k_pages, v_pages, batch.pages, ends, scale, window)
    out = torch.empty_like(q)
    offset = 0
    singles: list[tuple[int, int]] = []
    for s, (start, rows) in enumerate(batch.spans):
        if rows == 1:
            singles.append((s, offset))
        elif rows > 1:
            chunk = q[offset : offset + rows]
            out[offset : offset + rows] = _chunk(
                chunk, k_pages, v_pages, batch.pages[s], start, scale, window
            )
        offset += rows
    if singles:
        seqs, rows = torch.tensor(singles, device=q.device).unbind(1)
        ends = batch.starts.long()[seqs] + 1
        decoded = _decode(q[rows], k_pages, v_pages, batch.pages[seqs], ends, scale, window)
        out[rows] = decoded.view(len(singles), *q.shape[1:])
    return out.flatten(1)


def _decode(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query a sequence, all sequences at once. q [S, Hq, d], ends [S] -> [S, Hq * d]."""
    kv_heads, page_size = k_pages.shape[1:3]
    longest = int(ends.max())
    table = table[:, : -(-longest // page_size)]
    k, v = (gather(p, table, longest) for p in (k_pages, v_pages))
    position = torch.arange(longest, device=q.device)
    seen = position < ends[:, None]
    if window is not None:
        seen &= position >= ends[:, None] - window
    # Pages may hold anything past a sequence's end (NaN in tests): 0 * NaN would spread it.
    v = torch.where(seen[:, None, :, None], v, 0)
    k = torch.where(seen[:, None, :, None], k, 0)
    grouped = q.view(len(q), kv_heads, -1, q.shape[-1])
    out = F.scaled_dot_product_attention(grouped, k, v, seen[:, None, None], scale=scale)
    return out.reshape(len(q), -1)


def _chunk(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    start: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Consecutive queries of one sequence, the first at position `start`. q [n, Hq, d]."""
    end = start + len(q)
    table = table[None, : -(-end // k_pages.shape[2])]
    k, v = (gather(p, table, end) for p in (k_pages, v_pages))
    queries = q.transpose(0, 1)[None]
    if start == 0 and window is None:
        out = F.scaled_dot_product_attention(
            queries, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        position = torch.arange(end, device=q.device)
        row = torch.arange(start, end, device=q.device)[:, None]
        seen = position <= row
        if window is not None:
            seen &= position > row - window
            v = torch.where((position > start - window)[:, None], v, 0)
        out = F.scaled_dot_product_attention(queries, k, v, seen, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def gather(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Pages of each row of table [S, P] side by side, cut to length. -> [S, Hkv, length, d]."""
    gathered = pages[table.long()].transpose(1, 2)
    return gathered.flatten(2, 3)[:, :, :length]
