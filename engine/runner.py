"""Runs a batch through a model on its device: eagerly, or by replaying a captured graph.

Batches are built on the host. On a CPU they run as they are. On a GPU they are uploaded in one
copy and nothing waits for the device: a token that the step before has chosen and the host does not
know yet is taken from where the device keeps the last token of each slot.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from .graphs import StepGraphs
from .output import Output
from .staging import Staging

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ..cache import LayerState, StateSpec
    from .models import ForwardBatch, Ops
    from .resolve import Limits


class Model(Protocol):
    """What the engine needs of a model."""

    @property
    def ops(self) -> Ops:
        """The kernels that it runs on."""
        ...

    @property
    def state_spec(self) -> StateSpec:
        """The state it carries."""
        ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [L, V] of the rows wanted."""
        ...


class Runner:
    """A model on a device, and the last token of each slot there."""

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
        self.graph_replays: Counter[int] = Counter()
        """Replayed graphs by their rows."""
        self.num_padding_tokens = 0
        """Rows of replayed graphs that belonged to nobody."""
        self._last = torch.zeros(limits.sizes.num_slots + 1, dtype=torch.int64, device=device)
        self._staging = Staging(device) if device.type == "cuda" else None
        self._graphs = None
        if graphs and self._staging is not None and model.ops.is_capturable:
            self._graphs = StepGraphs(
                self._step, model.ops, self._staging, layers, limits, device, on_progress
            )

    def forward(self, batch: ForwardBatch) -> Output:
        """Launches a step of a batch built on the host."""
        if self._graphs is not None and (graph := self._graphs.find(batch)) is not None:
            self.graph_replays[graph.rows] += 1
            self.num_padding_tokens += graph.rows - len(batch.token_ids)
            return graph.replay(batch)
        if self._staging is not None:
            batch = self._staging.upload(batch)
        logits, best = self._step(batch)
        return Output(logits, best, by_sequence=False)

    def feed(self, slots: Tensor, token_ids: Tensor) -> None:
        """Makes these the last tokens of their slots, in place of the greedy choices."""
        self._last[slots] = token_ids

    def _step(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """-> logits [L, V], greedy choices [L], which are the last tokens of their slots now."""
        ops, flat = self._model.ops, batch.flat
        tokens = ops.fed_tokens(batch.token_ids, self._last, flat)
        logits = self._model.forward(replace(batch, token_ids=tokens))
        best = ops.argmax(logits)
        ops.keep_tokens(best, batch.logit_rows, self._last, flat)
        return logits, best
