"""FlatBatch records for op tests: ragged sequences at any start, in shuffled slots and pages."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
from convserve.kernels import PADDING, FlatBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def flat_batch(
    lens: Sequence[tuple[int, int]],
    *,
    ring_len: int = 4,
    page_size: int = 4,
    padding: int = 0,
    seed: int = 0,
) -> FlatBatch:
    """A batch of sequences `lens = [(context, new rows)]`, slots and pages in random order.

    Slots are a permutation of 1..S and pages of 1..N, as `num_slots` and `num_pages` count them.
    `padding` rows are appended that belong to nobody.
    """
    rng = random.Random(seed)
    slots = rng.sample(range(1, len(lens) + 1), len(lens))
    per_sequence = [-(-(start + rows) // page_size) for start, rows in lens]
    ids = rng.sample(range(1, sum(per_sequence) + 1), sum(per_sequence))
    table = torch.zeros(len(lens), max(per_sequence, default=1), dtype=torch.int32)
    for s, count in enumerate(per_sequence):
        table[s, :count] = torch.tensor([ids.pop() for _ in range(count)])
    positions: list[int] = []
    row_seq: list[int] = []
    kv_rows: list[int] = []
    ring_rows: list[int] = []
    for s, (start, rows) in enumerate(lens):
        for p in range(start, start + rows):
            positions.append(p)
            row_seq.append(s)
            kv_rows.append(int(table[s, p // page_size]) * page_size + p % page_size)
            kept = p >= start + rows - ring_len
            ring_rows.append(slots[s] * ring_len + p % ring_len if kept else PADDING)
    for column, fill in ((positions, PADDING), (row_seq, 0), (kv_rows, PADDING)):
        column += [fill] * padding
    ring_rows += [PADDING] * padding
    offsets = torch.tensor([0, *(rows for _, rows in lens)]).cumsum(0)
    return FlatBatch(
        positions=torch.tensor(positions, dtype=torch.int64),
        row_seq=torch.tensor(row_seq, dtype=torch.int32),
        starts=torch.tensor([start for start, _ in lens], dtype=torch.int32),
        offsets=offsets.int(),
        slots=torch.tensor(slots, dtype=torch.int32),
        pages=table,
        kv_rows=torch.tensor(kv_rows, dtype=torch.int64),
        ring_rows=torch.tensor(ring_rows, dtype=torch.int64),
        ring_len=ring_len,
        max_rows=max((rows for _, rows in lens), default=0),
        max_len=max((start + rows for start, rows in lens), default=0),
        spans=tuple(lens),
    )


def poisoned_ring(batch: FlatBatch, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A ring [slots + 1, ring_len, channels] full of NaN."""
    return torch.full((len(batch.slots) + 1, batch.ring_len, channels), torch.nan, dtype=dtype)


def fill_ring(ring: Tensor, slot: int, end: int, window: Tensor) -> None:
    """Puts `window` [n, D], the inputs of positions end-n .. end-1, where they belong."""
    for i, row in enumerate(window):
        position = end - len(window) + i
        if position >= 0:
            ring[slot, position % ring.shape[1]] = row


def read_ring(ring: Tensor, slot: int, end: int, count: int) -> Tensor:
    """The inputs of positions end-count .. end-1, oldest first, zero before 0. -> [count, D]."""
    rows = [
        ring[slot, p % ring.shape[1]] if p >= 0 else torch.zeros_like(ring[0, 0])
        for p in range(end - count, end)
    ]
    return torch.stack(rows)
