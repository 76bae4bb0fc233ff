"""Runs a batch through a model on its device: eagerly, or by replaying a captured graph.

Batches are built on the host. On a CPU they run as they are; on a GPU the rows of a step in which
every sequence has one row are copied into fixed buffers and a graph of that size is replayed.
Everything else is moved to the device and runs kernel by kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .graphs import DecodeGraphs

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..cache import LayerState, StateSpec
    from .models import ForwardBatch
    from .resolve import Limits


class Model(Protocol):
    """What the engine needs of a model."""

    @property
    def state_spec(self) -> StateSpec:
        """The state it carries."""
        ...

    @property
    def is_capturable(self) -> bool:
        """A forward pass never waits for the device, so a graph can hold it."""
        ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [L, V] of the rows wanted."""
        ...


class Runner:
    """A model on a device, with graphs if they are wanted and the device has them."""

    def __init__(
        self,
        model: Model,
        layers: tuple[LayerState, ...],
        limits: Limits,
        device: torch.device,
        *,
        graphs: bool = True,
        on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Captures every graph now, so that no request waits for one.

        Args:
            on_progress: called with (graphs captured, graphs in all).
        """
        self._model = model
        self._device = device
        self._graphs: DecodeGraphs | None = None
        if graphs and device.type == "cuda" and model.is_capturable:
            self._graphs = DecodeGraphs(model.forward, layers, limits, device, on_progress)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [L, V] on the device; valid until the next call. `batch` is on the host."""
        if self._graphs is not None and (graph := self._graphs.find(batch)) is not None:
            return graph.replay(batch)
        return self._model.forward(batch.to(self._device))
