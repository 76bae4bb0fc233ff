"""The decoder: embeddings, layers, logits. One class for every family that `config.py` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...cache.specs import AttentionSpec, LayerSpec, StateSpec
from .checkpoint import CheckpointReader
from .layers import AttentionBlock, BlockBuilder, ExpertsBlock, MLPBlock, Norm
from .replay import RowDropper, tokens_needed
from .rope import rope_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from ...kernels import Ops
    from .config import ModelConfig
    from .forward_batch import ForwardBatch


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
        self._ops = ops
        c = config
        table = reader.take("model.embed_tokens.weight", (c.vocab_size, c.hidden_size))
        self._layers: list[tuple[AttentionBlock, MLPBlock | ExpertsBlock]] = []
        self._norms: list[Norm] = []
        specs: list[LayerSpec] = []
        attention = AttentionSpec(c.num_kv_heads, c.head_dim)
        for i in range(c.num_layers):
            builder = BlockBuilder(ops, c, reader, i)
            for name in ("input_layernorm", "post_attention_layernorm"):
                self._norms.append(self._norm(reader, f"model.layers.{i}.{name}"))
            self._layers.append((builder.attention(), builder.mlp()))
            specs.append(LayerSpec(attention, builder.conv_specs))
        self._norms.append(self._norm(reader, "model.norm"))
        head = "lm_head.weight"
        if c.tied_embeddings:
            if head in reader:
                reader.skip(head)
            self._table, self._head = ops.pack_tied(table)
        else:
            self._table = table
            self._head = ops.pack_linear(reader.take(head, (c.vocab_size, c.hidden_size)), None)
        self._needed = tokens_needed(c)
        self.state_spec = StateSpec(tuple(specs), dtype, self._needed[0])
        self._rope = rope_table(c.rope, c.max_positions, device)

    @property
    def is_capturable(self) -> bool:
        """See `engine.runner.Model`. Experts are looked up on the host."""
        return self.config.experts is None

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Runs one step: reads and writes state, returns logits [L, vocab] of the wanted rows."""
        flat, ops = batch.flat, self._ops
        rope = self._rope[flat.positions.clamp_min(0)]
        residual = ops.embed(batch.token_ids, self._table)
        x = ops.rms_norm(residual, self._norms[0].weight, self._norms[0].eps)
        dropper = RowDropper(batch, self._needed) if batch.shared is not None else None
        for i, (attention, mlp) in enumerate(self._layers):
            if dropper is not None and (rows := dropper.before(i)) is not None:
                x, residual, rope, flat = x[rows], residual[rows], rope[rows], dropper.flat
            state = batch.state[i]
            x, residual = attention(x, residual, self._norms[2 * i + 1], rope, state, flat)
            x, residual = mlp(x, residual, self._norms[2 * i + 2], state, flat)
        logit_rows = batch.logit_rows if dropper is None else dropper.logit_rows
        return ops.linear(x[logit_rows], self._head)

    def _norm(self, reader: CheckpointReader, name: str) -> Norm:
        return Norm(reader.take(f"{name}.weight", (self.config.hidden_size,)), self.config.eps)


def load_decoder(
    folder: Path,
    config: ModelConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Decoder:
    """Streams the weights of `folder` into a Decoder.

    Args:
        on_progress: called with (elements read, elements in all) after each tensor.

    Raises:
        ModelError: one line naming the tensor or file that is wrong.
    """
    done = 0

    def advance(elements: int) -> None:
        nonlocal done
        done += elements
        on_progress(done, reader.total_elements)

    with CheckpointReader(folder, dtype, device, advance) as reader:
        model = Decoder(ops, config, reader, dtype, device)
        reader.finish()
    return model
