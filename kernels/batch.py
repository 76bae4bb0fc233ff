"""The flat batch: which rows of a step belong to which sequence, and where their state lives.

A step is a flat list of token rows. Sequence `s` owns rows `offsets[s] : offsets[s + 1]`, which
stand at absolute positions `starts[s], starts[s] + 1, ...`. A prefill chunk, a decode step and a
verification run differ in nothing but the number of rows. Every op that touches carried state
takes this record and nothing else about the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PADDING = -1
"""In `kv_rows`, `ring_rows` and `positions`: this row belongs to nobody; write nothing for it."""


@dataclass(frozen=True)
class FlatBatch:
    """Geometry and addresses of one step. T token rows, S sequences.

    Rows of a sequence are contiguous and ascending. Padding rows (captured graphs only) come last,
    after `offsets[S]`; their position, kv row and ring row are `PADDING`. Padding *sequences* have
    no rows and point at page 0 and slot 0, which no live sequence ever owns.
    """

    positions: Tensor
    """[T] int64. Absolute position of each row in its sequence."""
    row_seq: Tensor
    """[T] int32. Index of the sequence each row belongs to, in 0..S-1."""
    starts: Tensor
    """[S] int32. Position of the sequence's first row in this step (its context length)."""
    offsets: Tensor
    """[S + 1] int32. First row of each sequence."""
    slots: Tensor
    """[S] int32. Conv-ring slot of each sequence."""
    pages: Tensor
    """[S, P] int32. Page table: position p lies in page `pages[s, p // page_size]`."""
    kv_rows: Tensor
    """[T] int64. Where a row's K and V are stored, `page * page_size + offset`; or `PADDING`."""
    ring_rows: Tensor
    """[T] int64. Where a row's conv inputs are stored, `slot * ring_len + position % ring_len`;
    `PADDING` for rows that a later row of the same step overwrites."""
    ring_len: int
    """Rows per ring slot. A power of two, at least the conv width."""
    max_rows: int
    """Upper bound on the rows of one sequence in this step (launch geometry)."""
    max_len: int
    """Upper bound on `starts[s] + rows of s` (launch geometry)."""
    spans: tuple[tuple[int, int], ...] | None = None
    """Host copy of (start, rows) for each sequence. `None` inside a captured graph, where only
    kernels run; reference ops need it."""

    @cached_property
    def kv_write(self) -> tuple[Tensor | None, Tensor]:
        """(rows to store or None for all, their destinations) for the K and V pages."""
        return _kept(self.kv_rows)

    @cached_property
    def ring_write(self) -> tuple[Tensor | None, Tensor]:
        """(rows to store or None for all, their destinations) for the conv rings."""
        return _kept(self.ring_rows)

    @cached_property
    def is_decode(self) -> bool:
        """Every sequence has exactly one row."""
        return self.spans is not None and all(rows == 1 for _, rows in self.spans)

    def tap_sources(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the inputs at `position - tap` are found, for taps 1 .. width-1.

        Returns:
            in_step: [T, width-1] bool, the source is a row of this step.
            row: [T, width-1] int64, that row (0 where `in_step` is false).
            ring_row: [T, width-1] int64, the ring row to read otherwise, or `PADDING` where the
                position is negative and the input is zero.
        """
        cached = self._tap_sources.get(width)
        if cached is not None:
            return cached
        taps = torch.arange(1, width, device=self.positions.device)
        seq = self.row_seq.long()
        local = self.positions - self.starts.long()[seq]
        source = self.positions[:, None] - taps
        in_step = local[:, None] >= taps
        index = torch.arange(len(self.positions), device=self.positions.device)
        row = torch.where(in_step, index[:, None] - taps, 0)
        ring_row = self.slots.long()[seq][:, None] * self.ring_len + source.remainder(self.ring_len)
        ring_row = torch.where((source >= 0) & ~in_step, ring_row, PADDING)
        self._tap_sources[width] = (in_step, row, ring_row)
        return in_step, row, ring_row

    @cached_property
    def _tap_sources(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        return {}


def _kept(destinations: Tensor) -> tuple[Tensor | None, Tensor]:
    kept = (destinations != PADDING).nonzero().squeeze(1)
    if len(kept) == len(destinations):
        return None, destinations
    return kept, destinations[kept]
