"""torch's own paged attention as a peer: `varlen_attn` with a block table, from torch 2.12 on.

Knows nothing of other kernels; says in words when the torch in use does not have it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import varlen

if TYPE_CHECKING:
    from collections.abc import Callable

    from convserve.kernels import FlatBatch

PAGE = 256
"""The page size that its kernels take."""


def missing() -> str | None:
    """Why there is nothing to measure; None where there is."""
    if "block_table" in inspect.signature(varlen.varlen_attn).parameters:
        return None
    return f"torch {torch.__version__} has no varlen_attn with block_table (torch 2.12 has)"


def attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, batch: FlatBatch, scale: float
) -> Callable[[], object]:
    """Causal attention of a batch. q [T, Hq, d], pages [pages, Hkv, PAGE, d], as views of which
    torch's [pages, PAGE, Hkv, d] are made."""
    used = batch.starts + batch.offsets.diff()
    options = {
        "scale": scale, "window_size": (-1, 0), "enable_gqa": q.shape[1] != k_pages.shape[1],
        "seqused_k": used, "block_table": batch.pages,
    }  # fmt: skip
    keys, values = k_pages.transpose(1, 2), v_pages.transpose(1, 2)
    return lambda: varlen.varlen_attn(
        q, keys, values, batch.offsets, None, batch.max_rows, batch.max_len, **options
    )
