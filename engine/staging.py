"""One copy per step: every index tensor of a batch, packed into one block of bytes.

A batch is built on the host. For a device its tensors are written into pinned memory in one layout,
padded to the shape that a captured graph was made for, and uploaded at once. Two pinned blocks take
turns, since the upload of a step may still wait behind the step before it. Knows nothing of graphs
or models; on a CPU nothing here is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from .models import PADDING, FlatBatch, ForwardBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from ..cache import LayerState


ALIGNMENT = 16
"""Of every field, in bytes: kernels are compiled apart for pointers that are less aligned."""

MAX_LAYOUTS = 512
"""Layouts remembered: those of captured graphs, and of late steps without one."""


@dataclass(frozen=True)
class StepShape:
    """The sizes of a step's tensors, and its bounds."""

    rows: int
    """T, token rows."""
    seqs: int
    """S, sequences."""
    columns: int
    """P, pages of the longest sequence."""
    logits: int
    """L, rows with logits."""
    max_rows: int
    max_len: int
    ring_len: int

    @cached_property
    def fields(self) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
        """Name, dtype and shape of each tensor, the wider dtype first."""
        rows, seqs = self.rows, self.seqs
        return (
            ("token_ids", torch.int64, (rows,)),
            ("positions", torch.int64, (rows,)),
            ("kv_rows", torch.int64, (rows,)),
            ("ring_rows", torch.int64, (rows,)),
            ("logit_rows", torch.int64, (self.logits,)),
            ("row_seq", torch.int32, (rows,)),
            ("starts", torch.int32, (seqs,)),
            ("offsets", torch.int32, (seqs + 1,)),
            ("slots", torch.int32, (seqs,)),
            ("pages", torch.int32, (seqs, self.columns)),
        )

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(first byte, bytes) of each field."""
        found: list[tuple[int, int]] = []
        at = 0
        for _, dtype, shape in self.fields:
            size = dtype.itemsize * math.prod(shape)
            found.append((at, size))
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return tuple(found)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a packed batch."""
        return sum(self.places[-1])

    def views(self, block: Tensor) -> dict[str, Tensor]:
        """The tensors that lie in a block of at least `num_bytes` bytes [uint8]."""
        return {
            name: block[at : at + size].view(dtype).view(shape)
            for (name, dtype, shape), (at, size) in zip(self.fields, self.places, strict=True)
        }

    def batch(self, block: Tensor, state: tuple[LayerState, ...]) -> ForwardBatch:
        """A batch whose tensors lie in the block."""
        views = self.views(block)
        flat = FlatBatch(
            positions=views["positions"],
            row_seq=views["row_seq"],
            starts=views["starts"],
            offsets=views["offsets"],
            slots=views["slots"],
            pages=views["pages"],
            kv_rows=views["kv_rows"],
            ring_rows=views["ring_rows"],
            ring_len=self.ring_len,
            max_rows=self.max_rows,
            max_len=self.max_len,
        )
        return ForwardBatch(views["token_ids"], flat, state, views["logit_rows"])


def shape_of(batch: ForwardBatch) -> StepShape:
    """The batch's own shape, nothing padded."""
    flat = batch.flat
    return StepShape(
        rows=len(batch.token_ids),
        seqs=len(flat.starts),
        columns=flat.pages.shape[1],
        logits=len(batch.logit_rows),
        max_rows=flat.max_rows,
        max_len=flat.max_len,
        ring_len=flat.ring_len,
    )


class Staging:
    """Pinned memory between the host's batches and the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks = [_Block(device.type == "cuda") for _ in range(2)]

    def upload(self, batch: ForwardBatch) -> ForwardBatch:
        """The same batch on the device, without waiting for it."""
        shape = shape_of(batch)
        block = self._fill(batch, shape)
        target = torch.empty(shape.num_bytes, dtype=torch.uint8, device=self._device)
        self._copy(block, target)
        uploaded = shape.batch(target, batch.state)
        return replace(
            uploaded,
            flat=replace(uploaded.flat, spans=batch.flat.spans),
            shared=batch.shared,
            is_scored=batch.is_scored,
        )

    def upload_padded(self, batch: ForwardBatch, shape: StepShape, target: Tensor) -> None:
        """Writes the batch, padded to a shape with a logit row per sequence, into `target`
        [shape.num_bytes] uint8 on the device."""
        self._copy(self._fill(batch, shape), target)

    def _fill(self, batch: ForwardBatch, shape: StepShape) -> Tensor:
        block = self._blocks[0]
        self._blocks.reverse()
        views = block.views(shape)
        flat = batch.flat
        rows, (seqs, columns) = len(batch.token_ids), flat.pages.shape
        for name in ("positions", "kv_rows", "ring_rows"):
            views[name][:rows] = getattr(flat, name).numpy()
            views[name][rows:] = PADDING
        views["token_ids"][:rows] = batch.token_ids.numpy()
        views["token_ids"][rows:] = 0
        views["row_seq"][:rows] = flat.row_seq.numpy()
        views["row_seq"][rows:] = 0
        for name in ("starts", "slots"):
            views[name][:seqs] = getattr(flat, name).numpy()
            views[name][seqs:] = 0
        views["offsets"][: seqs + 1] = flat.offsets.numpy()
        views["offsets"][seqs + 1 :] = rows
        views["pages"][:seqs, :columns] = flat.pages.numpy()
        views["pages"][seqs:] = 0
        if shape.logits == len(batch.logit_rows) and shape.seqs == seqs:
            views["logit_rows"][:] = batch.logit_rows.numpy()
        elif shape.max_rows == 1:  # so that all rows are wanted, in their order
            views["logit_rows"][:] = np.arange(shape.logits)
        else:
            views["logit_rows"][:] = views["offsets"][1:] - 1
        return block.bytes[: shape.num_bytes]

    def _copy(self, block: Tensor, target: Tensor) -> None:
        target.copy_(block, non_blocking=True)
        self._blocks[-1].lend()


class _Block:
    """Bytes on the host, pinned for a device, that may be written again once it has read them."""

    def __init__(self, pinned: bool) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._lent = torch.cuda.Event() if pinned else None
        self._views: dict[StepShape, dict[str, NDArray[np.int64 | np.int32]]] = {}

    def lend(self) -> None:
        """The device reads the bytes from here on."""
        if self._lent is not None:
            self._lent.record()

    def views(self, shape: StepShape) -> dict[str, NDArray[np.int64 | np.int32]]:
        """Arrays over the bytes, once the last upload from them is over."""
        if self._lent is not None:
            self._lent.synchronize()
        if len(self.bytes) < shape.num_bytes:
            size = 1 << max(shape.num_bytes - 1, 2**16).bit_length()
            self.bytes = torch.empty(size, dtype=torch.uint8, pin_memory=self._lent is not None)
            self._views.clear()
        views = self._views.get(shape)
        if views is None:
            if len(self._views) >= MAX_LAYOUTS:
                self._views.clear()
            views = {name: t.numpy() for name, t in shape.views(self.bytes).items()}
            self._views[shape] = views
        return views
