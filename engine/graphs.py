"""CUDA graphs of whole steps: tokens in, logits and greedy choices out.

One kind serves steps in which every sequence advances by one token: a graph per number of sequences
on a ladder, and per bound on context length, which decides how attention splits its work. The
other serves steps with prompts, replays and whatever runs beside them: a graph per number of rows,
for one sequence, for some and for all. A step runs in the smallest graph that holds it, padded:
rows and sequences that are nobody's point at the reserved page and slot, and kernels store nothing
for them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .models import FlatBatch, ForwardBatch
from .output import Output
from .staging import StepShape

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cache import LayerState
    from .models import Ops
    from .resolve import Limits
    from .staging import Staging

    Step = Callable[[ForwardBatch], tuple[Tensor, Tensor]]

_log = logging.getLogger(__name__)

LENGTHS = (1024, 4096, 16384)
"""Context bounds that have graphs of their own, besides the longest."""

CHUNKS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Row counts with a graph, then every 256 up to the step's budget."""

FEW = 8
"""Sequences of the graphs between those for one and those for all."""


def ladder(most: int) -> list[int]:
    """Batch sizes with a graph: 1, 2, 4, then steps of 8, 16 above 64 and 32 above 256."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, most + 1, 32)]
    return [*(size for size in sizes if size < most), most]


def chunks(most: int) -> list[int]:
    """Row counts of steps with prompts that have a graph."""
    sizes = [*CHUNKS, *range(768, most + 1, 256)]
    return [*(size for size in sizes if size < most), most]


def shapes(limits: Limits) -> list[StepShape]:
    """Every shape that is captured, the largest first, so that smaller ones fit in its memory."""
    sizes = limits.sizes
    most, page = sizes.num_slots, sizes.page_size
    lengths = [n for n in LENGTHS if n < limits.max_model_len] + [limits.max_model_len]

    def shape(rows: int, seqs: int, max_rows: int, max_len: int) -> StepShape:
        return StepShape(rows, seqs, -(-max_len // page), seqs, max_rows, max_len, sizes.ring_len)

    mixed = [
        shape(rows, seqs, min(rows, limits.max_model_len), limits.max_model_len)
        for rows in chunks(limits.max_batch_tokens)
        for seqs in sorted({1, min(FEW, most), most})
        if seqs <= rows
    ]
    decode = [shape(size, size, 1, length) for length in lengths for size in ladder(most)]
    return sorted(mixed + decode, key=lambda s: (-s.rows, -s.seqs))


class StepGraph:
    """One captured step over a fixed block of inputs and fixed outputs."""

    def __init__(
        self,
        step: Step,
        staging: Staging,
        shape: StepShape,
        state: tuple[LayerState, ...],
        block: Tensor,
        side: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        """
        Args:
            block: bytes on the device that the inputs are uploaded to.
            side: the stream to capture on; memory of the pool is used again on one stream alone.
        """
        self._shape, self._staging = shape, staging
        self._block = block[: shape.num_bytes]
        batch = shape.batch(self._block, state)
        staging.upload_padded(_nobody(shape), shape, self._block)
        step(batch)  # compiles whatever is not compiled yet
        self.graph = torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        # Not `torch.cuda.graph`, which collects garbage each time: a second for every few graphs.
        with torch.cuda.stream(side):
            self.graph.capture_begin(*([] if pool is None else [pool]))
            logits, best = step(batch)
            self.graph.capture_end()
        # Not held: the next graphs may use the memory again, which is in order, for a step's output
        # is valid until the next step.
        self._logits, self._best = _borrowed(logits), _borrowed(best)
        torch.cuda.current_stream().wait_stream(side)

    @property
    def rows(self) -> int:
        """Token rows of the graph."""
        return self._shape.rows

    def replay(self, batch: ForwardBatch) -> Output:
        """Runs a step that fits."""
        self._staging.upload_padded(batch, self._shape, self._block)
        self.graph.replay()
        seqs = len(batch.flat.starts)
        return Output(self._logits[:seqs], self._best[:seqs], by_sequence=True)


class StepGraphs:
    """Every graph of an engine."""

    def __init__(
        self,
        step: Step,
        ops: Ops,
        staging: Staging,
        layers: tuple[LayerState, ...],
        limits: Limits,
        device: torch.device,
        on_progress: Callable[[int, int], None],
    ) -> None:
        """Captures them all in one memory pool, with every kernel there first."""
        wanted = shapes(limits)
        block = torch.empty(max(s.num_bytes for s in wanted), dtype=torch.uint8, device=device)
        side, pool = torch.cuda.Stream(), None
        self._decode: list[tuple[StepShape, StepGraph]] = []
        self._mixed: list[tuple[StepShape, StepGraph]] = []
        torch.cuda.synchronize()
        with torch.inference_mode():
            _compile_ahead(step, ops, staging, wanted, layers, block)
            for done, shape in enumerate(wanted, 1):
                graph = StepGraph(step, staging, shape, layers, block, side, pool)
                pool = pool or graph.graph.pool()
                kind = self._decode if shape.max_rows == 1 else self._mixed
                kind.append((shape, graph))
                on_progress(done, len(wanted))
        self._decode.sort(key=lambda g: (g[0].rows, g[0].max_len))
        self._mixed.sort(key=lambda g: (g[0].rows, g[0].seqs))

    def find(self, batch: ForwardBatch) -> StepGraph | None:
        """The smallest graph that can run the batch; None if none can."""
        if batch.is_scored:
            return None
        flat = batch.flat
        rows, seqs = len(batch.token_ids), len(flat.starts)
        kind = self._decode if flat.max_rows == 1 else self._mixed
        for shape, graph in kind:
            if shape.rows >= rows and shape.seqs >= seqs and shape.max_len >= flat.max_len:
                return graph
        return None


def _compile_ahead(
    step: Step,
    ops: Ops,
    staging: Staging,
    wanted: list[StepShape],
    layers: tuple[LayerState, ...],
    block: Tensor,
) -> None:
    """Compiles the kernels of all steps at once. What that misses is compiled when it is met."""
    try:
        with ops.compiling() as is_walk:
            for shape in wanted if is_walk else ():
                staging.upload_padded(_nobody(shape), shape, block[: shape.num_bytes])
                step(shape.batch(block[: shape.num_bytes], layers))
    except Exception:  # it stands in for Triton's insides, and a start can do without it
        _log.warning("kernels are compiled one by one; all at once failed", exc_info=True)


class _Memory:
    """Bytes on a device as `torch.as_tensor` takes them, without what keeps them allocated."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.numel() * tensor.element_size(),),
            "typestr": "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }


def _borrowed(tensor: Tensor) -> Tensor:
    """The same contiguous memory, which belongs to the graphs' pool and lives as long as it."""
    flat = torch.as_tensor(_Memory(tensor), device=tensor.device)
    return flat.view(tensor.dtype).view(tensor.shape)


def _nobody(shape: StepShape) -> ForwardBatch:
    """A batch of no rows, on the host."""

    def empty(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype)

    flat = FlatBatch(
        positions=empty(0),
        row_seq=empty(0, dtype=torch.int32),
        starts=empty(0, dtype=torch.int32),
        offsets=torch.zeros(1, dtype=torch.int32),
        slots=empty(0, dtype=torch.int32),
        pages=empty(0, shape.columns, dtype=torch.int32),
        kv_rows=empty(0),
        ring_rows=empty(0),
        ring_len=shape.ring_len,
        max_rows=shape.max_rows,
        max_len=shape.max_len,
    )
    return ForwardBatch(empty(0), flat, (), empty(0))
