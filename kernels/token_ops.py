"""The part of the kernel contract about token ids: from ids to rows, and from logits to ids.

As in `ops`, each method is the reference that other backends override. Knows nothing of layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from . import reference_sampling
from .weights import PackedLinear

if TYPE_CHECKING:
    from torch import Tensor

    from .batch import FlatBatch


class TokenOps:
    """Where a step's tokens come from, and what is chosen at its end."""

    def fed_tokens(self, token_ids: Tensor, last: Tensor, batch: FlatBatch) -> Tensor:
        """Token ids, with the last token of its slot in place of each that is not known (negative).

        Args:
            token_ids: [T] int64.
            last: [slots] int64; -1 for a sequence that has ended because of broken logits.

        Returns:
            [T] int64, none negative.
        """
        slots = batch.slots.long()[batch.row_seq.long()]
        return torch.where(token_ids < 0, last[slots], token_ids).clamp_min_(0)

    def keep_tokens(self, ids: Tensor, rows: Tensor, last: Tensor, batch: FlatBatch) -> None:
        """Makes chosen tokens the last ones of their slots.

        Args:
            ids: [L] int64, chosen from the logits of `rows` [L] int64. Of several rows of one
                sequence only its last one chooses; a negative row is nobody's.
            last: [slots] int64, written in place; slot 0 belongs to nobody.
        """
        seqs = batch.row_seq.long()[rows]
        is_last = (batch.offsets.long()[seqs + 1] - 1 == rows) & (rows >= 0)
        last[torch.where(is_last, batch.slots.long()[seqs], 0)] = ids

    def take_rows(self, table: Tensor, rows: Tensor) -> Tensor:
        """Rows of a table [N, D], `rows` [T] int64 -> [T, D]; anything where one is negative."""
        return table[rows.clamp_min(0)]

    def embed(self, token_ids: Tensor, table: Tensor | PackedLinear) -> Tensor:
        """token_ids [T] int64, table [V, H] (or as `pack_tied` gave it) -> [T, H]."""
        return F.embedding(token_ids, table.weight if isinstance(table, PackedLinear) else table)

    def argmax(self, logits: Tensor) -> Tensor:
        """The greedy choice. logits [N, V] -> [N] int64; the first of equals.

        -1 where a row has no finite best: it holds NaN or infinity, or nothing but -infinity.
        """
        best, ids = logits.max(dim=-1)
        return torch.where(torch.isfinite(best), ids, -1)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draws a token a row: in order of id, the first whose cumulative probability exceeds u.

        First min-p, then top-k of what is left, then top-p of that. Equals share a filter's fate.

        Args:
            logits: [N, V].
            temperature: [N] float32; 0 for the greedy choice.
            top_k: [N] int32; 0 or V for no limit.
            top_p, min_p: [N] float32; 1 and 0 for no limit.
            u: [N] float64, uniform in [0, 1).

        Returns:
            [N] int64; -1 as `argmax`.
        """
        return reference_sampling.sample(logits, temperature, top_k, top_p, min_p, u)
