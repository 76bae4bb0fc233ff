"""The decoder: embeddings, layers, logits. One class for every family that `config.py` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .builder import BlockBuilder, load_norm
from .checkpoint import CheckpointReader
from .layers import AttentionBlock, ExpertsBlock, MLPBlock, Norm
from .replay import RowDropper, tokens_needed
from .rope import rope_table
from .state import state_spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from ...kernels import Ops
    from .config import ModelConfig
    from .forward_batch import ForwardBatch
    from .mixer_layers import MixerBlock


class Decoder:
    """A loaded model. Stateless: everything a sequence carries comes with the batch."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        reader: CheckpointReader,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.num_elements = reader.total_elements
        self.dtype = dtype
        self.device = device
        self.ops = ops
        c = config
        names = c.names
        table = reader.take(f"{names.embeddings}.weight", (c.vocab_size, c.hidden_size))
        self._layers: list[tuple[AttentionBlock | MixerBlock, MLPBlock | ExpertsBlock | None]] = []
        self._norms: list[Norm] = []
        for i in range(c.num_layers):
            builder = BlockBuilder(ops, c, reader, i)
            self._norms.append(self._norm(reader, f"{names.layers}.{i}.{names.mixer_norm}"))
            if c.has_mlp:
                self._norms.append(self._norm(reader, f"{names.layers}.{i}.{names.mlp_norm}"))
            self._layers.append((builder.mixer(), builder.mlp() if c.has_mlp else None))
        self._norms.append(self._norm(reader, names.norm))
        head = "lm_head.weight"
        if c.tied_embeddings:
            if head in reader:
                reader.skip(head)
            self._table, self._head = ops.pack_tied(table)
        else:
            self._table = table
            self._head = ops.pack_linear(reader.take(head, (c.vocab_size, c.hidden_size)), None)
        self._needed = tokens_needed(c)
        self.state_spec = state_spec(c, dtype)
        self._rope = (
            rope_table(c.rope, c.max_positions, device)
            if c.has_attention
            else torch.empty((c.max_positions, 0), device=device)
        )

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Runs one step: reads and writes state, returns logits [L, vocab] of the wanted rows."""
        flat, ops = batch.flat, self.ops
        rope = ops.take_rows(self._rope, flat.positions)
        residual = ops.embed(batch.token_ids, self._table)
        x = ops.rms_norm(residual, self._norms[0].weight, self._norms[0].eps)
        dropper = RowDropper(batch, self._needed) if batch.shared is not None else None
        norms = iter(self._norms[1:])
        for i, (mixer, mlp) in enumerate(self._layers):
            if dropper is not None and (rows := dropper.before(i)) is not None:
                x, residual, rope, flat = x[rows], residual[rows], rope[rows], dropper.flat
            state = batch.state[i]
            x, residual = mixer(x, residual, next(norms), rope, state, flat)
            if mlp is not None:
                x, residual = mlp(x, residual, next(norms), state, flat)
        logit_rows = batch.logit_rows if dropper is None else dropper.logit_rows
        # Of sequences of one row each that all want logits, every row is wanted, in its order.
        if flat.max_rows > 1 or len(logit_rows) != len(x):
            x = ops.take_rows(x, logit_rows)
        return ops.linear(x, self._head)

    def _norm(self, reader: CheckpointReader, name: str) -> Norm:
        c = self.config
        return Norm(load_norm(reader, name, c.hidden_size, c.norm_offset), c.eps)


def load_decoder(
    folder: Path,
    config: ModelConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    adapter: Path | None = None,
) -> Decoder:
    """Streams the weights of `folder` into a Decoder.

    Args:
        adapter: a file of convolutions to read along, which `config` already counts in.
        on_progress: called with (elements read, elements in all) after each tensor.

    Raises:
        ModelError: one line naming the tensor or file that is wrong.
    """
    done = 0

    def advance(elements: int) -> None:
        nonlocal done
        done += elements
        on_progress(done, reader.total_elements)

    with CheckpointReader(folder, dtype, device, advance, adapter) as reader:
        model = Decoder(ops, config, reader, dtype, device)
        reader.finish()
    return model
