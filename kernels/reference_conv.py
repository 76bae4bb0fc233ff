"""Short causal convolution with carried state: the truth that every other kernel is held to.

State is addressed by absolute position. The raw input of position p lies in ring row
`slot * ring_len + p % ring_len`, whatever step wrote it; a row reads its older taps from this
step's rows where the step reaches back far enough and from the ring otherwise, and positions below
zero read as zero. Nothing is ever shifted, so taking tokens back is changing one integer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from .batch import FlatBatch
    from .filters import ConvFilter


def conv(
    x: Tensor,
    z: Tensor | None,
    filters: ConvFilter,
    ring: Tensor,
    batch: FlatBatch,
    apply: Callable[[Tensor, Tensor | None, ConvFilter], Tensor] | None = None,
) -> Tensor:
    """See `Ops.conv`. Older rows are read before any is stored: a chunk may wrap the ring.

    Args:
        apply: what generates and applies the filters, if not `apply_filter`.
    """
    covered = torch.cat([x[:, s.start : s.stop] for s in filters.streams], dim=1)
    window = gather_window(covered, ring, batch, filters.width)
    y = (apply or apply_filter)(window, z, filters).to(x.dtype)
    store_ring(covered, ring, batch)
    if filters.channels == x.shape[1]:
        return y
    out = x.clone()
    done = 0
    for s in filters.streams:
        out[:, s.start : s.stop] = y[:, done : done + s.stop - s.start]
        done += s.stop - s.start
    return out


def gather_window(x: Tensor, ring: Tensor, batch: FlatBatch, width: int) -> Tensor:
    """The last `width` inputs of each row, current first. x [T, D] -> [T, W, D]."""
    in_step, row, ring_row = batch.tap_sources(width)
    # The ring may hold anything where no token was written (NaN in tests): select, never multiply.
    older = ring.flatten(0, 1)[ring_row.clamp_min(0)]
    older = torch.where((ring_row >= 0)[..., None], older, 0)
    if batch.max_rows > 1:
        older = torch.where(in_step[..., None], x[row], older)
    return torch.cat((x[:, None], older), dim=1)


def apply_filter(window: Tensor, z: Tensor | None, filters: ConvFilter) -> Tensor:
    """Generates each row's filter and applies it. window [T, W, D] -> [T, D], not yet rounded."""
    dtype = torch.promote_types(window.dtype, torch.float32)
    f = filters.static.to(dtype)
    if filters.kind != "static":
        assert z is not None
        f = f + dynamic_taps(z.to(dtype), filters)
    y = (f * window).sum(1)
    if filters.bias is not None:
        y = y + filters.bias
    y = y * filters.scale
    return F.silu(y) if filters.activation == "silu" else y


def dynamic_taps(
    z: Tensor, filters: ConvFilter, product: Callable[[Tensor, Tensor], Tensor] = F.linear
) -> Tensor:
    """The input-dependent part of the filters. z [T, Z] -> [T, W, D].

    Args:
        product: x [T, in] times weight [out, in] -> [T, out].
    """
    parts: list[Tensor] = []
    done = 0
    for s in filters.streams:
        channels = s.stop - s.start
        if filters.up is not None:
            up = filters.up[:, :, done : done + channels].to(z.dtype)
            code = z[:, s.z_start : s.z_start + filters.rank]
            taps = product(code, up.flatten(1).t())
            parts.append(taps.reshape(-1, filters.width, channels))
        else:
            heads = channels // filters.head_size
            taps = z[:, s.z_start : s.z_start + heads * filters.width]
            taps = taps.view(-1, heads, filters.width).transpose(1, 2)
            parts.append(taps.repeat_interleave(filters.head_size, dim=2))
        done += channels
    return torch.cat(parts, dim=2)


def store_ring(x: Tensor, ring: Tensor, batch: FlatBatch) -> None:
    """Writes x [T, D] to the ring rows that the batch names."""
    rows, destinations = batch.ring_write
    ring.flatten(0, 1)[destinations] = x if rows is None else x[rows]
