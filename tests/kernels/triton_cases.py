"""Random steps over a poisoned cache, for comparing the Triton ops with the reference.

What the step may not read (rings and pages outside the live history) and what it must write
(outputs) is NaN, so a wrong address shows as NaN, not as a small error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from convserve.kernels import PADDING, ConvFilter, FlatBatch, Stream
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Layout:
    """Where a step's sequences live."""

    batch: FlatBatch
    num_pages: int
    num_slots: int
    page_size: int


def make_layout(
    runs: list[tuple[int, int]],
    *,
    ring_len: int = 4,
    page_size: int = 16,
    padding_rows: int = 0,
    padding_seqs: int = 0,
    max_rows: int | None = None,
) -> Layout:
    """A step of `runs` = (start, rows) of each sequence, at shuffled slots and pages."""
    generator = torch.Generator().manual_seed(len(runs) + 7 * ring_len)
    seqs = len(runs) + padding_seqs
    per_seq = max(-(-(start + rows) // page_size) for start, rows in runs)
    num_pages = seqs * per_seq + 2
    num_slots = seqs + 3
    free_pages = (torch.randperm(num_pages - 1, generator=generator) + 1).tolist()
    free_slots = (torch.randperm(num_slots - 1, generator=generator) + 1).tolist()
    pages = torch.zeros(seqs, per_seq + 1, dtype=torch.int32)
    slots = torch.zeros(seqs, dtype=torch.int32)
    starts = torch.zeros(seqs, dtype=torch.int32)
    offsets = torch.zeros(seqs + 1, dtype=torch.int32)
    positions, row_seq, kv_rows, ring_rows = [], [], [], []
    for s, (start, rows) in enumerate(runs):
        used = -(-(start + rows) // page_size)
        for p in range(used):
            pages[s, p] = free_pages.pop()
        slots[s] = free_slots.pop()
        starts[s] = start
        offsets[s + 1] = offsets[s] + rows
        for p in range(start, start + rows):
            positions.append(p)
            row_seq.append(s)
            kv_rows.append(int(pages[s, p // page_size]) * page_size + p % page_size)
            last = p + ring_len >= start + rows
            ring_rows.append(int(slots[s]) * ring_len + p % ring_len if last else PADDING)
    offsets[len(runs) + 1 :] = offsets[len(runs)]
    for _ in range(padding_rows):
        positions.append(PADDING)
        row_seq.append(0)
        kv_rows.append(PADDING)
        ring_rows.append(PADDING)
    batch = FlatBatch(
        positions=torch.tensor(positions, dtype=torch.int64, device=DEVICE),
        row_seq=torch.tensor(row_seq, dtype=torch.int32, device=DEVICE),
        starts=starts.to(DEVICE),
        offsets=offsets.to(DEVICE),
        slots=slots.to(DEVICE),
        pages=pages.to(DEVICE),
        kv_rows=torch.tensor(kv_rows, dtype=torch.int64, device=DEVICE),
        ring_rows=torch.tensor(ring_rows, dtype=torch.int64, device=DEVICE),
        ring_len=ring_len,
        max_rows=max_rows or max(rows for _, rows in runs),
        max_len=max(start + rows for start, rows in runs),
        spans=tuple(runs) + ((0, 0),) * padding_seqs,
    )
    return Layout(batch, num_pages, num_slots, page_size)


def live_rows(layout: Layout) -> int:
    """Rows that are not padding."""
    return int((layout.batch.positions >= 0).sum())


def live_only(batch: FlatBatch) -> FlatBatch:
    """The batch without its padding, as the reference takes it."""
    rows = int((batch.positions >= 0).sum())
    spans = tuple(s for s in batch.spans or () if s[1] > 0)
    n = len(spans)
    return replace(
        batch,
        positions=batch.positions[:rows],
        row_seq=batch.row_seq[:rows],
        kv_rows=batch.kv_rows[:rows],
        ring_rows=batch.ring_rows[:rows],
        starts=batch.starts[:n],
        offsets=batch.offsets[: n + 1],
        slots=batch.slots[:n],
        pages=batch.pages[:n],
        spans=spans,
    )


def make_ring(layout: Layout, width: int, channels: int, dtype: torch.dtype) -> Tensor:
    """A ring that is NaN but for the window before each sequence's first row."""
    ring_len = layout.batch.ring_len
    ring = torch.full((layout.num_slots, ring_len, channels), float("nan"), dtype=dtype)
    for (start, _), slot in zip(layout.batch.spans or (), layout.batch.slots.tolist(), strict=True):
        for p in range(max(0, start - width + 1), start):
            ring[slot, p % ring_len] = torch.randn(channels).to(dtype)
    return ring.to(DEVICE)


def make_pages(layout: Layout, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Pages that are NaN but for the context before each sequence's first row."""
    size = layout.page_size
    pages = torch.full((layout.num_pages, heads, size, dim), float("nan"), dtype=dtype)
    table = layout.batch.pages.tolist()
    for s, (start, _) in enumerate(layout.batch.spans or ()):
        for p in range(start):
            pages[table[s][p // size], :, p % size] = torch.randn(heads, dim).to(dtype)
    return pages.to(DEVICE)


def make_filter(
    kind: str,
    width: int,
    parts: list[tuple[int, int]],
    *,
    rank: int = 5,
    head_size: int = 4,
    bias: bool = True,
    silu: bool = False,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[ConvFilter, int]:
    """A filter over streams at columns `parts`, and the number of z columns it reads."""
    streams, z_at = [], 0
    for start, stop in parts:
        streams.append(Stream(start, stop, z_at))
        if kind == "lowrank":
            z_at += rank
        elif kind == "headwise":
            z_at += (stop - start) // head_size * width
    channels = sum(stop - start for start, stop in parts)
    static = torch.randn(width, channels) / width**0.5
    static[0] += 1.0
    up = None
    if kind == "lowrank":
        up = (torch.randn(rank, width, channels) / rank**0.5).to(DEVICE, dtype)
    return ConvFilter(
        kind=kind,  # pyright: ignore[reportArgumentType]
        width=width,
        streams=tuple(streams),
        static=static.to(DEVICE),
        up=up,
        head_size=head_size if kind == "headwise" else 0,
        bias=torch.randn(channels).to(DEVICE) if bias else None,
        scale=scale,
        activation="silu" if silu else None,
    ), z_at


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random values, rounded to `dtype` on the CPU so that every device sees the same."""
    return torch.randn(*shape).to(dtype).to(DEVICE)


def wide(value: object) -> object:
    """A float64 copy of a tensor, or of a filter's `up`; everything else as it is."""
    if isinstance(value, ConvFilter):
        up = None if value.up is None else value.up.double()
        return replace(value, up=up, static=value.static.double())
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def assert_close(got: Tensor, truth: Tensor) -> None:
    """Within rounding of the float64 truth: 1e-5 for float32, half an ulp for bfloat16.

    Triton's interpreter truncates to bfloat16, which is a whole ulp.
    """
    assert got.shape == truth.shape
    error = (got.double() - truth).norm() / truth.norm()
    bound = 1e-5 if got.dtype == torch.float32 else 3e-3 if got.is_cuda else 7e-3
    assert error < bound, f"relative error {error:.2e}"


def nan_bits(ring: Tensor) -> Tensor:
    """A tensor with every NaN made one number, so that poison compares equal to poison."""
    return torch.nan_to_num(ring.float(), nan=12345.0)
