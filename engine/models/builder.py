"""From a checkpoint's tensors to the blocks of one layer.

Linear layers that read the same input are merged. Filter generators ride as extra rows of the
linear layer whose input they read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...kernels import AttentionParts, Convolved, MLPParts, QKNorm
from .conv_site import ConvSite, Member, load_site, static_site
from .layers import AttentionBlock, ExpertsBlock, MLPBlock, SharedExpert
from .mixer_builder import load_mixer
from .mixers import Attention
from .rope import half_order

if TYPE_CHECKING:
    from torch import Tensor

    from ...kernels import ConvFilter, Ops, PackedLinear
    from .checkpoint import CheckpointReader
    from .config import ModelConfig
    from .conv_config import Place
    from .mixer_layers import MixerBlock


class BlockBuilder:
    """Loads the blocks of one layer."""

    def __init__(self, ops: Ops, config: ModelConfig, reader: CheckpointReader, layer: int) -> None:
        self._ops = ops
        self._config = config
        self._reader = reader
        self._layer = layer
        self._prefix = f"{config.names.layers}.{layer}"
        self._conv = config.conv_of(layer)

    def mixer(self) -> AttentionBlock | MixerBlock:
        """The block before the MLP."""
        mixer = self._config.mixers[self._layer]
        if isinstance(mixer, Attention):
            return self._attention(mixer.window)
        prefix = f"{self._prefix}.{self._config.names.mixer}"
        return load_mixer(mixer, self._ops, self._reader, prefix, self._config.hidden_size)

    def _attention(self, window: int | None) -> AttentionBlock:
        c, prefix = self._config, f"{self._prefix}.{self._config.names.attention}"
        members = (
            Member("q", prefix, c.q_width, c.hidden_size),
            Member("k", prefix, c.kv_width, c.hidden_size),
            Member("v", prefix, c.kv_width, c.hidden_size),
        )
        o = Member("o", prefix, c.hidden_size, self._generator_width(c.q_width))
        (qkv, qkv_conv), (o_linear, o_conv) = self._pair(
            ("qkv", members, c.hidden_size, c.attention_bias), ("o", (o,), c.q_width, c.o_bias)
        )
        parts = AttentionParts(
            qkv,
            qkv_conv,
            o_linear,
            o_conv,
            self._reads_block_norm,
            c.num_heads,
            c.num_kv_heads,
            c.head_dim,
            self._qk_norm(prefix),
            window,
        )
        gate = None
        if c.attention_gate:
            start = c.q_width + 2 * c.kv_width
            gate = slice(start, start + c.q_width)
        return AttentionBlock(self._ops, parts, self._input_conv("mixer_in"), gate)

    def mlp(self) -> MLPBlock | ExpertsBlock:
        """The MLP block, or the experts if the model has them."""
        c, prefix = self._config, f"{self._prefix}.{self._config.names.mlp}"
        if c.experts is not None:
            return self._experts(prefix)
        members = (
            Member("gate", prefix, c.intermediate_size, c.hidden_size),
            Member("up", prefix, c.intermediate_size, c.hidden_size),
        )
        down = Member("down", prefix, c.hidden_size, self._generator_width(c.intermediate_size))
        (gate_up, gate_up_conv), (down_linear, down_conv) = self._pair(
            ("gate_up", members, c.hidden_size, c.mlp_bias),
            ("down", (down,), c.intermediate_size, c.mlp_bias),
        )
        parts = MLPParts(
            gate_up,
            gate_up_conv,
            down_linear,
            down_conv,
            self._reads_block_norm,
            c.intermediate_size,
        )
        return MLPBlock(self._ops, parts, self._input_conv("mlp_in"))

    @property
    def _reads_block_norm(self) -> bool:
        return self._conv is not None and self._conv.generator_input == "block_norm"

    def _generator_width(self, linear_input: int) -> int:
        return self._config.hidden_size if self._reads_block_norm else linear_input

    def _pair(
        self,
        first: tuple[str, tuple[Member, ...], int, bool],
        second: tuple[str, tuple[Member, ...], int, bool],
    ) -> tuple[tuple[PackedLinear, Convolved], tuple[PackedLinear, Convolved]]:
        """The two merged linears of a block. Generators that read the block's normed input ride
        in the first, whichever convolution they are for."""
        name1, members1, in1, bias1 = first
        name2, members2, in2, bias2 = second
        site1, site2 = (self._site(n, m) for n, m in ((name1, members1), (name2, members2)))
        rows1 = site1.generators if site1 else ()
        rows2 = site2.generators if site2 else ()
        width1, z1 = sum(m.width for m in members1), sum(map(len, rows1))
        width2, z2 = sum(m.width for m in members2), sum(map(len, rows2))
        if self._reads_block_norm:
            linear1 = self._linear(members1, in1, bias1, (*rows1, *rows2))
            linear2 = self._linear(members2, in2, bias2, ())
            z2_start = width1 + z1
        else:
            linear1 = self._linear(members1, in1, bias1, rows1)
            linear2 = self._linear(members2, in2, bias2, rows2)
            z2_start = width2
        conv1 = Convolved(site1.filters if site1 else None, slice(width1, width1 + z1))
        conv2 = Convolved(site2.filters if site2 else None, slice(z2_start, z2_start + z2))
        return (linear1, conv1), (linear2, conv2)

    def _site(self, name: str, members: tuple[Member, ...]) -> ConvSite | None:
        conv = self._conv
        if conv is None or conv.stored == "dynconv":
            return load_site(conv, members, self._reader)
        canon = {"qkv": "self_attn.canonB", "gate_up": "mlp.canonD"}
        canon |= {"mixer_in": "canonA", "mlp_in": "canonC"}
        if name not in canon or members[0].place not in conv.placement:
            return None
        channels = sum(m.width for m in members)
        tensor = f"{self._prefix}.{canon[name]}.weight"
        weight = self._reader.take(tensor, (channels, 1, conv.width), torch.float32)
        if name == "qkv":
            weight = torch.cat(
                [
                    part if order is None else part[order]
                    for part, order in zip(
                        weight.split([m.width for m in members]),
                        map(self._row_order, members),
                        strict=True,
                    )
                ]
            )
        return static_site(weight, [m.width for m in members], residual=conv.residual)

    def _input_conv(self, place: Place) -> ConvFilter | None:
        hidden = self._config.hidden_size
        site = self._site(place, (Member(place, self._prefix, hidden, hidden),))
        return site.filters if site else None

    def _linear(
        self,
        members: tuple[Member, ...],
        in_features: int,
        has_bias: bool,
        generators: tuple[Tensor, ...],
    ) -> PackedLinear:
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        gates: list[Tensor] = []
        for m in members:
            rows = m.width * (2 if m.place == "q" and self._config.attention_gate else 1)
            name = f"{m.prefix}.{self._config.names.linear(m.place)}"
            weight = self._reader.take(f"{name}.weight", (rows, in_features))
            if rows != m.width:
                # Per head, the query's rows and then the gate's.
                weight = weight.unflatten(0, (-1, 2, self._config.head_dim))
                gates.append(weight[:, 1].flatten(0, 1))
                weight = weight[:, 0].flatten(0, 1)
            bias = self._reader.take(f"{name}.bias", (m.width,)) if has_bias else None
            order = self._row_order(m)
            if order is not None:
                weight, bias = weight[order], None if bias is None else bias[order]
            weights.append(weight)
            if bias is not None:
                biases.append(bias)
        bias = None
        if has_bias:
            extra = sum(map(len, (*gates, *generators)))
            bias = torch.cat((*biases, biases[0].new_zeros(extra)))
        return self._ops.pack_linear(torch.cat((*weights, *gates, *generators)), bias)

    def _row_order(self, member: Member) -> Tensor | None:
        """Where the checkpoint's rows of q and k go; None for as they are.

        Neighbouring channels that RoPE turns together are moved half a rotation apart: queries
        and keys alike, so that their products stay what they are.
        """
        c = self._config
        if not c.interleaved_rope or member.place not in ("q", "k"):
            return None
        return half_order(member.width // c.head_dim, c.head_dim, c.rope.rotary_dim)

    def _qk_norm(self, prefix: str) -> QKNorm | None:
        c = self._config
        if c.qk_norm == "none":
            return None
        widths = (c.head_dim, c.head_dim) if c.qk_norm == "head" else (c.q_width, c.kv_width)
        q, k = (
            load_norm(self._reader, f"{prefix}.{name}", width, c.norm_offset)
            for name, width in zip(c.names.qk_norms, widths, strict=True)
        )
        if c.interleaved_rope:
            heads = (1, 1) if c.qk_norm == "head" else (c.num_heads, c.num_kv_heads)
            q, k = (
                w[half_order(n, c.head_dim, c.rope.rotary_dim)]
                for w, n in zip((q, k), heads, strict=True)
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
            c.experts,
            self._ops.pack_linear(router, None),
            torch.stack(gate_up),
            torch.stack(down),
            self._shared_expert(prefix),
        )

    def _shared_expert(self, prefix: str) -> SharedExpert | None:
        c = self._config
        assert c.experts is not None
        width, hidden = c.experts.shared_width, c.hidden_size
        if not width:
            return None
        take, name = self._reader.take, f"{prefix}.shared_expert"
        gate_up = [take(f"{name}.{part}_proj.weight", (width, hidden)) for part in ("gate", "up")]
        return SharedExpert(
            self._ops.pack_linear(torch.cat(gate_up), None),
            self._ops.pack_linear(take(f"{name}.down_proj.weight", (hidden, width)), None),
            self._ops.pack_linear(take(f"{prefix}.shared_expert_gate.weight", (1, hidden)), None),
        )


def load_norm(reader: CheckpointReader, name: str, width: int, offset: float = 0.0) -> Tensor:
    """An RMSNorm's weight [width]; with an offset in float32, where adding it loses nothing."""
    if not offset:
        return reader.take(f"{name}.weight", (width,))
    return reader.take(f"{name}.weight", (width,), torch.float32) + offset
