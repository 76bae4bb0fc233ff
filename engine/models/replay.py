"""Replay: how many tokens make every conv window exact, and which of them each layer still needs.

The keys and values of a prefix of P tokens are cached, its conv windows are not. Its last N tokens
are run again from windows that may hold anything, reading the cached keys and values and writing
none. A wrong window spoils the first W - 1 outputs of a convolution, so each convolution met in
series along the residual path costs W - 1 tokens; attention spoils nothing, because it reads what
is cached. After N = (W - 1) * (convolutions in series) tokens every window at P is exact. Deeper
layers need fewer of them: only what the convolutions still ahead will spoil.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .mixers import ShortConv

if TYPE_CHECKING:
    from torch import Tensor

    from ...kernels import FlatBatch
    from .config import ModelConfig
    from .forward_batch import ForwardBatch

WORTH_DROPPING = 16
"""Rows: fewer are cheaper to compute than to leave out."""


def tokens_needed(config: ModelConfig) -> tuple[int, ...]:
    """For each layer, the tokens before P that it must see to make every later window exact.

    Where only k and v are convolved nothing is met in series, but windows must be refilled: W - 1.
    """
    needed: list[int] = []
    serial, widest = 0, 0
    for layer in reversed(range(config.num_layers)):
        mixer, conv = config.mixers[layer], config.conv_of(layer)
        if isinstance(mixer, ShortConv):
            serial += mixer.width - 1
            widest = max(widest, mixer.width - 1)
        if conv is not None:
            serial += (conv.width - 1) * conv.serial_per_layer
            widest = max(widest, conv.width - 1)
        needed.append(max(serial, widest))
    return tuple(reversed(needed))


def replay_length(config: ModelConfig) -> int | None:
    """N of the whole model; None if it has recurrent state, which needs every token."""
    if config.has_recurrence:
        return None
    return tokens_needed(config)[0]


class RowDropper:
    """Leaves rows of replays out of a step, layer by layer, as they stop being needed."""

    def __init__(self, batch: ForwardBatch, needed: tuple[int, ...]) -> None:
        assert batch.shared is not None
        assert batch.flat.spans is not None
        self.flat = batch.flat
        """The rows that are left."""
        self.logit_rows = batch.logit_rows
        """The wanted rows among them; they are never left out."""
        self._shared = batch.shared
        self._needed = needed
        self._spans = list(batch.flat.spans)

    def before(self, layer: int) -> Tensor | None:
        """Indices, among the rows left so far, of those that `layer` needs; None for all."""
        starts = [
            max(start, min(start + rows, shared - self._needed[layer]))
            for (start, rows), shared in zip(self._spans, self._shared, strict=True)
        ]
        ends = [start + rows for start, rows in self._spans]
        left = [end - start for start, end in zip(starts, ends, strict=True)]
        dropped = sum(rows for _, rows in self._spans) - sum(left)
        if dropped < WORTH_DROPPING or not sum(left):
            return None
        flat = self.flat
        device = flat.positions.device
        seq = flat.row_seq.long()
        keep = (flat.positions >= torch.tensor(starts, device=device)[seq]).nonzero().squeeze(1)
        alive = [s for s, rows in enumerate(left) if rows]
        place = torch.zeros(len(left), dtype=torch.int32, device=device)
        place[alive] = torch.arange(len(alive), dtype=torch.int32, device=device)
        self._spans = [(starts[s], left[s]) for s in alive]
        self._shared = tuple(self._shared[s] for s in alive)
        self.logit_rows = torch.searchsorted(keep, self.logit_rows)
        self.flat = self._narrowed(flat, keep, place, alive)
        return keep

    def _narrowed(
        self, flat: FlatBatch, keep: Tensor, place: Tensor, alive: list[int]
    ) -> FlatBatch:
        device = flat.positions.device
        rows = [count for _, count in self._spans]
        offsets = torch.tensor([0, *rows], device=device).cumsum(0, dtype=torch.int32)
        starts = torch.tensor([start for start, _ in self._spans], device=device)
        return replace(
            flat,
            positions=flat.positions[keep],
            row_seq=place[flat.row_seq[keep].long()],
            starts=starts.int(),
            offsets=offsets,
            slots=flat.slots[alive],
            pages=flat.pages[alive],
            kv_rows=flat.kv_rows[keep],
            ring_rows=flat.ring_rows[keep],
            max_rows=max(rows),
            spans=tuple(self._spans),
        )
