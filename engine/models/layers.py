"""The two blocks of a decoder layer: attention, and MLP or experts.

A block takes its normed input and the residual, and hands on both for the next block: the residual
add and the next norm are part of what follows its last linear layer, so that they can share a
launch with that layer's convolution. Filter generators ride as extra rows of the linear layer
whose input they read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...kernels import AttentionParts, Convolved, MLPParts, QKNorm
from .conv_site import ConvSite, Member, load_site

if TYPE_CHECKING:
    from torch import Tensor

    from ...cache.specs import ConvSpec, LayerState
    from ...kernels import FlatBatch, Ops, PackedLinear
    from .checkpoint import CheckpointReader
    from .config import ModelConfig


@dataclass(frozen=True)
class Norm:
    """An RMSNorm's parameters."""

    weight: Tensor
    eps: float


class AttentionBlock:
    """q, k, v -> convolution, norm, RoPE -> attention -> o -> convolution, residual, norm."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        qkv: PackedLinear,
        qkv_conv: Convolved,
        o: PackedLinear,
        o_conv: Convolved,
        o_code_from_input: bool,
        qk_norm: QKNorm | None,
        window: int | None,
    ) -> None:
        self._ops = ops
        self._parts = AttentionParts(
            qkv,
            qkv_conv,
            o,
            o_conv,
            o_code_from_input,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            qk_norm,
            window,
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: Norm,
        rope: Tensor,
        state: LayerState,
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (input of the next block, residual)."""
        assert state.k_pages is not None
        assert state.v_pages is not None
        return self._ops.attention_block(
            self._parts,
            x,
            residual,
            next_norm.weight,
            next_norm.eps,
            rope,
            state.k_pages,
            state.v_pages,
            state.rings,
            batch,
        )


class MLPBlock:
    """gate, up -> convolution, SiLU product -> down -> convolution, residual, norm."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        gate_up: PackedLinear,
        gate_up_conv: Convolved,
        down: PackedLinear,
        down_conv: Convolved,
        down_code_from_input: bool,
    ) -> None:
        self._ops = ops
        self._parts = MLPParts(
            gate_up,
            gate_up_conv,
            down,
            down_conv,
            down_code_from_input,
            config.intermediate_size,
        )

    def __call__(
        self, x: Tensor, residual: Tensor, next_norm: Norm, state: LayerState, batch: FlatBatch
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (input of the next block, residual)."""
        return self._ops.mlp_block(
            self._parts, x, residual, next_norm.weight, next_norm.eps, state.rings, batch
        )


class ExpertsBlock:
    """Router -> top-k SwiGLU experts -> residual, norm."""

    def __init__(
        self,
        ops: Ops,
        config: ModelConfig,
        router: PackedLinear,
        gate_up: Tensor,
        down: Tensor,
    ) -> None:
        assert config.experts is not None
        self._ops = ops
        self._experts = config.experts
        self._router, self._gate_up, self._down = router, gate_up, down

    def __call__(
        self, x: Tensor, residual: Tensor, next_norm: Norm, state: LayerState, batch: FlatBatch
    ) -> tuple[Tensor, Tensor]:
        """x, residual [T, hidden] -> (input of the next block, residual)."""
        logits = self._ops.linear(x, self._router)
        y = self._ops.moe(
            x,
            logits,
            self._gate_up,
            self._down,
            self._experts.per_token,
            self._experts.normalize,
        )
        return self._ops.add_rms_norm(y, residual, next_norm.weight, next_norm.eps)


class BlockBuilder:
    """Loads the blocks of one layer."""

    def __init__(self, ops: Ops, config: ModelConfig, reader: CheckpointReader, layer: int) -> None:
        self._ops = ops
        self._config = config
        self._reader = reader
        self._layer = layer
        self._conv = config.conv_of(layer)
        self.conv_specs: dict[str, ConvSpec] = {}
        """Filled as blocks are built: what the layer's sites ask of the cache."""

    def attention(self) -> AttentionBlock:
        """The attention block."""
        c, prefix = self._config, f"model.layers.{self._layer}.self_attn"
        members = (
            Member("q", prefix, c.q_width, c.hidden_size),
            Member("k", prefix, c.kv_width, c.hidden_size),
            Member("v", prefix, c.kv_width, c.hidden_size),
        )
        o = Member("o", prefix, c.hidden_size, self._generator_width(c.q_width))
        (qkv, qkv_conv), (o_linear, o_conv) = self._pair(
            ("qkv", members, c.hidden_size, c.attention_bias), ("o", (o,), c.q_width)
        )
        return AttentionBlock(
            self._ops,
            c,
            qkv,
            qkv_conv,
            o_linear,
            o_conv,
            self._reads_block_norm,
            self._qk_norm(prefix),
            c.windows[self._layer],
        )

    def mlp(self) -> MLPBlock | ExpertsBlock:
        """The MLP block, or the experts if the model has them."""
        c, prefix = self._config, f"model.layers.{self._layer}.mlp"
        if c.experts is not None:
            return self._experts(prefix)
        members = (
            Member("gate", prefix, c.intermediate_size, c.hidden_size),
            Member("up", prefix, c.intermediate_size, c.hidden_size),
        )
        down = Member("down", prefix, c.hidden_size, self._generator_width(c.intermediate_size))
        (gate_up, gate_up_conv), (down_linear, down_conv) = self._pair(
            ("gate_up", members, c.hidden_size, c.mlp_bias),
            ("down", (down,), c.intermediate_size),
        )
        return MLPBlock(
            self._ops, c, gate_up, gate_up_conv, down_linear, down_conv, self._reads_block_norm
        )

    @property
    def _reads_block_norm(self) -> bool:
        return self._conv is not None and self._conv.generator_input == "block_norm"

    def _generator_width(self, linear_input: int) -> int:
        return self._config.hidden_size if self._reads_block_norm else linear_input

    def _pair(
        self,
        first: tuple[str, tuple[Member, ...], int, bool],
        second: tuple[str, tuple[Member, ...], int],
    ) -> tuple[tuple[PackedLinear, Convolved], tuple[PackedLinear, Convolved]]:
        """The two merged linears of a block. Generators that read the block's normed input ride
        in the first, whichever convolution they are for."""
        name1, members1, in1, has_bias = first
        name2, members2, in2 = second
        site1, site2 = (self._site(n, m) for n, m in ((name1, members1), (name2, members2)))
        rows1 = site1.generators if site1 else ()
        rows2 = site2.generators if site2 else ()
        width1, z1 = sum(m.width for m in members1), sum(map(len, rows1))
        width2, z2 = sum(m.width for m in members2), sum(map(len, rows2))
        if self._reads_block_norm:
            linear1 = self._linear(members1, in1, has_bias, (*rows1, *rows2))
            linear2 = self._linear(members2, in2, has_bias, ())
            z2_start = width1 + z1
        else:
            linear1 = self._linear(members1, in1, has_bias, rows1)
            linear2 = self._linear(members2, in2, has_bias, rows2)
            z2_start = width2
        conv1 = Convolved(site1.filters if site1 else None, slice(width1, width1 + z1))
        conv2 = Convolved(site2.filters if site2 else None, slice(z2_start, z2_start + z2))
        return (linear1, conv1), (linear2, conv2)

    def _site(self, name: str, members: tuple[Member, ...]) -> ConvSite | None:
        site = load_site(self._conv, members, self._reader)
        if site is not None:
            self.conv_specs[name] = site.spec
        return site

    def _linear(
        self,
        members: tuple[Member, ...],
        in_features: int,
        has_bias: bool,
        generators: tuple[Tensor, ...],
    ) -> PackedLinear:
        weights = [
            self._reader.take(f"{m.prefix}.{m.place}_proj.weight", (m.width, in_features))
            for m in members
        ]
        bias = None
        if has_bias:
            biases = [
                self._reader.take(f"{m.prefix}.{m.place}_proj.bias", (m.width,)) for m in members
            ]
            extra = sum(map(len, generators))
            bias = torch.cat((*biases, biases[0].new_zeros(extra)))
        return self._ops.pack_linear(torch.cat((*weights, *generators)), bias)

    def _qk_norm(self, prefix: str) -> QKNorm | None:
        c = self._config
        if c.qk_norm == "none":
            return None
        widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (c.q_width, c.kv_width)
        q, k = (
            self._reader.take(f"{prefix}.{name}_norm.weight", (width,))
            for name, width in zip("qk", widths, strict=True)
        )
        order = self._conv.qk_norm_order if self._conv else "conv_first"
        return QKNorm(c.qk_norm, order, q, k, c.eps)

    def _experts(self, prefix: str) -> ExpertsBlock:
        c = self._config
        assert c.experts is not None
        width, hidden = c.experts.width, c.hidden_size
        router = self._reader.take(f"{prefix}.gate.weight", (c.experts.count, hidden))
        gate_up, down = [], []
        for expert in range(c.experts.count):
            name = f"{prefix}.experts.{expert}"
            gate_up.append(
                torch.cat(
                    [
                        self._reader.take(f"{name}.{part}_proj.weight", (width, hidden))
                        for part in ("gate", "up")
                    ]
                )
            )
            down.append(self._reader.take(f"{name}.down_proj.weight", (hidden, width)))
        return ExpertsBlock(
            self._ops,
            c,
            self._ops.pack_linear(router, None),
            torch.stack(gate_up),
            torch.stack(down),
        )
