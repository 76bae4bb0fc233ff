"""What a draw takes beside logits: the parameters of each row, and its random number."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from torch import Tensor

    from .sequence import Sequence


def uniform(seed: int, index: int, position: int) -> float:
    """A number in [0, 1) that depends on the seed, the choice and the position alone."""
    data = b"".join(n.to_bytes(8, "little") for n in (seed % 2**64, index, position))
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def draw_inputs(seqs: Rows[Sequence], vocab: int, device: torch.device) -> tuple[Tensor, ...]:
    """Temperature, top-k, top-p, min-p and the uniform number of each row, each [N], as
    `Ops.sample` takes them, without waiting for the device."""
    params = [s.params for s in seqs]
    numbers = [uniform(s.seed, s.index, len(s.tokens)) for s in seqs]
    columns = (
        torch.tensor([p.temperature for p in params], dtype=torch.float32),
        torch.tensor([min(max(p.top_k, 0), vocab) for p in params], dtype=torch.int32),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
        torch.tensor(numbers, dtype=torch.float64),
    )
    return tuple(column.to(device, non_blocking=True) for column in columns)
