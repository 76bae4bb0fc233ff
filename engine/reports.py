"""Log-probabilities of chosen and scored tokens, computed on the device and read later."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .messages import Logprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def to_host(value: Tensor) -> Tensor:
    """A copy on the host that is complete once the device has come so far; the same if there."""
    if value.device.type == "cpu":
        return value
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)


class Report:
    """Figures of some rows: the token's own and its k best rivals' from the same numbers."""

    def __init__(self, logits: Tensor, token_ids: Tensor, k: int) -> None:
        """Launches the work.

        Args:
            logits: [N, V] of the model, unadjusted.
            token_ids: [N] int64 on the same device.
            k: best tokens to report.
        """
        logprobs = logits.float().log_softmax(-1)
        index = token_ids[:, None]
        own = logprobs.gather(1, index)
        ranks = (logprobs > own).sum(1) + 1
        values, best = logprobs.topk(k, dim=-1) if k else (logprobs[:, :0], index[:, :0])
        columns = (token_ids, own.squeeze(1), ranks, best, values)
        self._columns = tuple(to_host(column) for column in columns)

    def read(self, counts: Sequence[int] | None = None) -> list[Logprobs]:
        """One record per row, with `counts[row]` rivals (all k without it).

        Only once the device has come so far.
        """
        rows = list(zip(*(column.tolist() for column in self._columns), strict=True))
        wanted = [None] * len(rows) if counts is None else counts
        return [
            Logprobs(token, value, rank, tuple(zip(best[:k], values[:k], strict=True)))
            for (token, value, rank, best, values), k in zip(rows, wanted, strict=True)
        ]
