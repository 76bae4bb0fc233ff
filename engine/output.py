"""What a step leaves on the device for the sampler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Output:
    """Valid until the next step is launched."""

    logits: Tensor
    """[L, V]; a row per sequence of the batch if `by_sequence`, else the rows that were asked for
    in their order."""
    best: Tensor
    """[L] int64, the greedy choice of each row; -1 where its logits are not finite."""
    by_sequence: bool
