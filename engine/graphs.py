"""CUDA graphs of steps in which every sequence advances by one token.

One graph per number of sequences on a ladder of sizes, and per bound on context length, which
decides how attention splits its work. A smaller step is padded: rows that belong to nobody point at
the reserved page and slot, and kernels store nothing for them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .models import PADDING, FlatBatch, ForwardBatch

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cache import LayerState
    from .resolve import Limits

LENGTHS = (1024, 4096, 16384)
"""Context bounds that have graphs of their own, besides the longest."""


def ladder(most: int) -> list[int]:
    """Batch sizes with a graph: 1, 2, 4, then steps of 8, 16 above 64 and 32 above 256."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most + 1, 32)]
    return [*(size for size in sizes if size < most), most]


class DecodeGraph:
    """One captured step over fixed buffers."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        buffers: ForwardBatch,
        staging: ForwardBatch,
        size: int,
        pool: Any,
    ) -> None:
        """
        Args:
            buffers: device tensors of the largest size; the graph reads their first `size` rows.
            staging: the same in pinned host memory.
        """
        self._size = size
        self._device_side = _cut(buffers, size)
        self._host_side = _cut(staging, size)
        self._clear(0)
        self._upload()
        forward(self._device_side)  # compiles whatever is not compiled yet
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self._logits = forward(self._device_side)

    def replay(self, batch: ForwardBatch) -> Tensor:
        """Runs a step of at most this size. -> logits [L, V], valid until the next replay."""
        host, flat = self._host_side, batch.flat
        count, columns = flat.pages.shape
        host.token_ids[:count] = batch.token_ids
        for name in ("positions", "starts", "slots", "kv_rows", "ring_rows"):
            getattr(host.flat, name)[:count] = getattr(flat, name)
        host.flat.pages[:count, :columns] = flat.pages
        self._clear(count)
        self._upload()
        self.graph.replay()
        return self._logits[:count]

    def _clear(self, first: int) -> None:
        """Makes the rows from `first` on padding."""
        flat = self._host_side.flat
        self._host_side.token_ids[first:] = 0
        flat.starts[first:] = 0
        flat.slots[first:] = 0
        flat.pages[first:] = 0
        for rows in (flat.positions, flat.kv_rows, flat.ring_rows):
            rows[first:] = PADDING

    def _upload(self) -> None:
        host, device = self._host_side, self._device_side
        device.token_ids.copy_(host.token_ids, non_blocking=True)
        for name in ("positions", "starts", "slots", "kv_rows", "ring_rows", "pages"):
            target: Tensor = getattr(device.flat, name)
            target.copy_(getattr(host.flat, name), non_blocking=True)


class DecodeGraphs:
    """Every graph of an engine."""

    def __init__(
        self,
        forward: Callable[[ForwardBatch], Tensor],
        layers: tuple[LayerState, ...],
        limits: Limits,
        device: torch.device,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Captures them all, the largest first, in one memory pool."""
        sizes = ladder(limits.sizes.num_slots)
        lengths = [n for n in LENGTHS if n < limits.max_model_len] + [limits.max_model_len]
        self._sizes = sizes
        self._lengths = lengths
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}
        pool: Any = None
        with torch.inference_mode():
            for length in lengths:
                buffers = _buffers(sizes[-1], length, layers, limits, device)
                staging = _buffers(sizes[-1], length, layers, limits, torch.device("cpu"))
                for size in reversed(sizes):
                    graph = DecodeGraph(forward, buffers, staging, size, pool)
                    pool = pool or graph.graph.pool()
                    self._graphs[size, length] = graph
                    on_progress(len(self._graphs), len(lengths) * len(sizes))

    def find(self, batch: ForwardBatch) -> DecodeGraph | None:
        """The smallest graph that can run the batch; None if none can."""
        spans = batch.flat.spans
        if spans is None or batch.shared is not None or not batch.flat.is_decode:
            return None
        if len(batch.logit_rows) != len(spans):
            return None
        size = next(size for size in self._sizes if size >= len(spans))
        length = next(length for length in self._lengths if length >= batch.flat.max_len)
        return self._graphs[size, length]


def _buffers(
    size: int,
    max_len: int,
    layers: tuple[LayerState, ...],
    limits: Limits,
    device: torch.device,
) -> ForwardBatch:
    """Tensors of `size` sequences with contexts up to `max_len`; pinned on the host."""
    columns = -(-max_len // limits.sizes.page_size)

    def tensor(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=device.type == "cpu")

    rows = torch.arange(size, device=device)
    flat = FlatBatch(
        positions=tensor(size),
        row_seq=rows.int(),
        starts=tensor(size, dtype=torch.int32),
        offsets=torch.arange(size + 1, dtype=torch.int32, device=device),
        slots=tensor(size, dtype=torch.int32),
        pages=tensor(size, columns, dtype=torch.int32),
        kv_rows=tensor(size),
        ring_rows=tensor(size),
        ring_len=limits.sizes.ring_len,
        max_rows=1,
        max_len=max_len,
    )
    return ForwardBatch(tensor(size), flat, layers, rows)


def _cut(batch: ForwardBatch, size: int) -> ForwardBatch:
    """The first rows of the buffers."""
    flat = batch.flat
    return replace(
        batch,
        token_ids=batch.token_ids[:size],
        logit_rows=batch.logit_rows[:size],
        flat=replace(
            flat,
            positions=flat.positions[:size],
            row_seq=flat.row_seq[:size],
            starts=flat.starts[:size],
            offsets=flat.offsets[: size + 1],
            slots=flat.slots[:size],
            pages=flat.pages[:size],
            kv_rows=flat.kv_rows[:size],
            ring_rows=flat.ring_rows[:size],
        ),
    )
