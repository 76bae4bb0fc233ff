"""What the tests of the CPU's ops are made of: steps, pages and rings full of NaN where a step may
not read, filters, and how near to float64 a result must be.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from convserve.kernels import ConvFilter, FlatBatch, Ops, Stream
from flat_batches import poisoned_ring

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = Ops()
BF16 = torch.bfloat16

STEPS = {
    "decode": [(0, 1), (1, 1), (2, 1), (70, 1)],
    "ragged": [(0, 3), (7, 1), (2, 2), (64, 5), (130, 3)],
    "chunk wraps the ring": [(3, 9), (0, 4), (11, 1), (2, 70)],
    "one": [(129, 1)],
}


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(BF16)


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def assert_close(got: Tensor, truth: Tensor, bound: float = 4e-3) -> None:
    """Within a bfloat16 rounding or two of the float64 truth, element for element NaN alike."""
    assert got.shape == truth.shape
    assert torch.equal(got.isnan(), truth.isnan())
    error = (got.double() - truth).nan_to_num().norm() / truth.nan_to_num().norm()
    assert error < bound, f"relative error {error:.2e}"


def pages_for(batch: FlatBatch, heads: int, size: int, dim: int) -> Tensor:
    """Pages full of NaN but for the positions before this step."""
    pages = torch.full((int(batch.pages.max()) + 1, heads, size, dim), torch.nan, dtype=BF16)
    for s, start in enumerate(batch.starts.tolist()):
        for p in range(start):
            pages[batch.pages[s, p // size], :, p % size] = normal(heads, dim)
    return pages


def ring_for(batch: FlatBatch, width: int, channels: int) -> Tensor:
    """A ring full of NaN but for the window before each sequence's first row."""
    ring = poisoned_ring(batch, channels, BF16)
    for slot, start in zip(batch.slots.tolist(), batch.starts.tolist(), strict=True):
        for p in range(max(0, start - width + 1), start):
            ring[slot, p % batch.ring_len] = normal(channels)
    return ring


def make_filter(
    kind: Literal["static", "lowrank", "headwise"],
    parts: list[tuple[int, int]],
    *,
    width: int = 4,
    plain: bool = False,
) -> tuple[ConvFilter, int]:
    """A filter over streams at columns `parts`, and how many z columns it reads."""
    per_stream = {
        "static": lambda _: 0,
        "lowrank": lambda _: 5,
        "headwise": lambda n: n // 2 * width,
    }
    streams, z = [], 0
    for start, stop in parts:
        streams.append(Stream(start, stop, z))
        z += per_stream[kind](stop - start)
    channels = sum(stop - start for start, stop in parts)
    return ConvFilter(
        kind=kind,
        width=width,
        streams=tuple(streams),
        static=torch.randn(width, channels),
        up=normal(5, width, channels, scale=0.4) if kind == "lowrank" else None,
        head_size=2,
        bias=None if plain else torch.randn(channels),
        scale=1.0 if plain else 0.7,
        activation=None if plain else "silu",
    ), z


def wide_filter(filters: ConvFilter) -> ConvFilter:
    return replace(filters, static=filters.static.double(), up=wide(filters.up))
