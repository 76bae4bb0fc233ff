"""From a plan to tensors: the one place where page ids, slots and rows are translated.

Sequence row: index of a work in the step. Token row: index of a token in the step. Page and slot
ids come from the cache manager. Page tables live in persistent host rows, one per slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .models import PADDING, FlatBatch, ForwardBatch

if TYPE_CHECKING:
    from ..cache import CacheManager, LayerState
    from ..cache.pools import SequenceId
    from .plan import StepPlan


FED = -1
"""In `token_ids`: the token that the step before has chosen for this slot."""


class BatchBuilder:
    """Builds ForwardBatch records for one cache, on the host."""

    def __init__(
        self,
        cache: CacheManager,
        state: tuple[LayerState, ...],
        max_model_len: int,
    ) -> None:
        sizes = cache.sizes
        self._cache = cache
        self._state = state
        self._table = np.zeros(
            (sizes.num_slots + 1, cache.pages_for(max_model_len)), dtype=np.int32
        )
        self._admission = [0] * (sizes.num_slots + 1)
        self._filled = [0] * (sizes.num_slots + 1)

    def build(self, plan: StepPlan) -> ForwardBatch:
        """Tensors of a non-empty plan."""
        works, sizes = plan.works, self._cache.sizes
        count = len(works)
        ids = [w.seq.id for w in works]
        starts = np.array([w.start for w in works], np.int32)
        rows = np.array([w.rows for w in works], np.int32)
        ends = starts + rows
        offsets = np.zeros(count + 1, np.int32)
        np.cumsum(rows, out=offsets[1:])
        for seq in ids:
            self._refresh(seq)
        slots = np.array([self._cache.slot(seq) for seq in ids], np.int32)
        max_len = int(ends.max())
        pages = self._table[slots, : self._cache.pages_for(max_len)]

        row_seq = np.repeat(np.arange(count, dtype=np.int32), rows)
        positions = np.arange(offsets[-1], dtype=np.int64) - (offsets[:-1] - starts)[row_seq]
        index, inside = np.divmod(positions, sizes.page_size)
        page = pages[row_seq, index].astype(np.int64)
        shared = np.array([self._cache.shared(seq) for seq in ids], np.int64)
        kv_rows = page * sizes.page_size + inside
        # A replay reads what others share and writes none of it.
        kv_rows[positions < shared[row_seq]] = PADDING
        ring_rows = slots[row_seq].astype(np.int64) * sizes.ring_len + positions % sizes.ring_len
        ring_rows[positions < (ends - sizes.ring_len)[row_seq]] = PADDING

        tokens: list[int] = []
        logit_rows: list[int] = []
        for work, offset in zip(works, offsets.tolist(), strict=False):
            if work.is_fed:
                tokens += work.seq.tokens[work.start :]
                tokens.append(FED)
            else:
                tokens += work.seq.tokens[work.start : work.stop]
            if work.score_rows:
                first = offset + work.score_from
                logit_rows += range(first, first + work.score_rows)
            if work.samples:
                logit_rows.append(offset + work.rows - 1)
        flat = FlatBatch(
            positions=torch.from_numpy(positions),
            row_seq=torch.from_numpy(row_seq),
            starts=torch.from_numpy(starts),
            offsets=torch.from_numpy(offsets),
            slots=torch.from_numpy(slots),
            pages=torch.from_numpy(pages),
            kv_rows=torch.from_numpy(kv_rows),
            ring_rows=torch.from_numpy(ring_rows),
            ring_len=sizes.ring_len,
            max_rows=int(rows.max()),
            max_len=max_len,
            spans=tuple(zip(starts.tolist(), rows.tolist(), strict=True)),
        )
        return ForwardBatch(
            token_ids=torch.from_numpy(np.array(tokens, dtype=np.int64)),
            flat=flat,
            state=self._state,
            logit_rows=torch.from_numpy(np.array(logit_rows, dtype=np.int64)),
            shared=tuple(shared.tolist()) if (starts < shared).any() else None,
            is_scored=any(w.score_rows for w in works),
        )

    def _refresh(self, seq: SequenceId) -> None:
        """Brings the slot's page-table row up to date; tables only ever grow at their end."""
        slot, pages = self._cache.slot(seq), self._cache.pages(seq)
        admission = self._cache.admission(seq)
        if self._admission[slot] != admission:
            self._admission[slot], self._filled[slot] = admission, 0
        filled = self._filled[slot]
        if filled < len(pages):
            self._table[slot, filled : len(pages)] = pages[filled:]
            self._filled[slot] = len(pages)
