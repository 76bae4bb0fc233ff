"""Runs a batch through a model on its device: eagerly, or by replaying a captured graph.

Batches are built on the host. On a CPU they run as they are. On a GPU they are uploaded in one
copy and nothing waits for the device: a token that the step before has chosen and the host does not
know yet (`FED`) is taken from where the device keeps the last token of each slot.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from .batch_builder import FED
from .graphs import StepGraphs
from .output import Output
from .staging import Staging

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

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

    @property
    def vocab_size(self) -> int:
        """Logits per row."""
        ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits [L, V] of the rows wanted."""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """[L, V] -> [L] int64, the best token of each row; -1 where a row is not finite."""
        ...

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        numbers: Tensor,
    ) -> Tensor:
        """A token drawn for each row; greedy at temperature 0; -1 as `argmax`."""
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
        if graphs and self._staging is not None and model.is_capturable:
            self._graphs = StepGraphs(
                self._step, self._staging, layers, limits, model.vocab_size, device, on_progress
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
        flat = batch.flat
        slots = flat.slots.long()
        fed = self._last[slots[flat.row_seq.long()]]
        # The token of a row that was not finite is -1; its sequence has ended.
        tokens = torch.where(batch.token_ids == FED, fed, batch.token_ids).clamp_min_(0)
        logits = self._model.forward(replace(batch, token_ids=tokens))
        best = self._model.argmax(logits)
        if len(best):
            seqs = flat.row_seq.long()[batch.logit_rows]
            wanted = slots[seqs]
            if batch.is_scored:  # of a sequence's several rows the last is the one that chooses
                is_last = flat.offsets.long()[seqs + 1] - 1 == batch.logit_rows
                wanted = torch.where(is_last, wanted, 0)
            self._last[wanted] = best
        return logits, best
