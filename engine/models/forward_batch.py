"""What one forward pass of a model reads: rows, addresses, state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...kernels import PADDING, FlatBatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ...cache.specs import LayerState

__all__ = ["PADDING", "FlatBatch", "ForwardBatch"]


@dataclass(frozen=True)
class ForwardBatch:
    """One step's input to a model. T rows, L of them with logits wanted."""

    token_ids: Tensor
    """[T] int64."""
    flat: FlatBatch
    state: tuple[LayerState, ...]
    """Pages and rings of each layer, read and written in place."""
    logit_rows: Tensor
    """[L] int64. Rows whose next-token logits are wanted."""
    shared: tuple[int, ...] | None = None
    """Per sequence, the position below which rows are a replay: run again for the conv windows
    alone. None if the step has no such rows."""
    is_scored: bool = False
    """Logits of other rows than the last one of a sequence are wanted too."""

    def to(self, device: torch.device) -> ForwardBatch:
        """The same batch with its tensors on `device`; the state is where it is."""
        if self.token_ids.device == device:
            return self
        return replace(
            self,
            token_ids=self.token_ids.to(device),
            logit_rows=self.logit_rows.to(device),
            flat=replace(
                self.flat, **{name: getattr(self.flat, name).to(device) for name in _FLAT_TENSORS}
            ),
        )


_FLAT_TENSORS = (
    "positions",
    "row_seq",
    "starts",
    "offsets",
    "slots",
    "pages",
    "kv_rows",
    "ring_rows",
)
