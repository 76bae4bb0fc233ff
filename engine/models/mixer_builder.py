"""From a checkpoint's tensors to the blocks that stand where attention does.

Knows every layout in which families store them; past it, the columns of each block's first linear
layer are in the order that `mixer_layers.py` states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ...kernels import ConvFilter, Convolved, DeltaParts, SSDParts, Stream
from .conv_site import ConvSite, Member, load_site, static_site
from .mixer_layers import DeltaBlock, Mamba2Block, MixerBlock, ShortConvBlock
from .mixers import GatedDelta, Mamba2, ShortConv

if TYPE_CHECKING:
    from torch import Tensor

    from ...kernels import Ops, PackedLinear
    from .checkpoint import CheckpointReader


def load_mixer(
    mixer: ShortConv | GatedDelta | Mamba2,
    ops: Ops,
    reader: CheckpointReader,
    prefix: str,
    hidden: int,
) -> MixerBlock:
    """Loads the mixer of one layer.

    Args:
        prefix: the module that holds it, such as `model.layers.0.linear_attn`.
    """
    if isinstance(mixer, ShortConv):
        return _short_conv(mixer, ops, reader, prefix, hidden)
    if isinstance(mixer, Mamba2):
        return _mamba2(mixer, ops, reader, prefix, hidden)
    return _gated_delta(mixer, ops, reader, prefix, hidden)


def _short_conv(
    mixer: ShortConv, ops: Ops, reader: CheckpointReader, prefix: str, hidden: int
) -> ShortConvBlock:
    weight = reader.take(f"{prefix}.conv.weight", (hidden, 1, mixer.width), torch.float32)
    bias = None
    if mixer.bias:
        bias = reader.take(f"{prefix}.conv.bias", (hidden,), torch.float32)
    return ShortConvBlock(
        ops,
        _linear(ops, reader, f"{prefix}.in_proj", 3 * hidden, hidden, mixer.bias),
        static_site(weight, [hidden], bias=bias).filters,
        _linear(ops, reader, f"{prefix}.out_proj", hidden, hidden, mixer.bias),
    )


def _mamba2(
    mixer: Mamba2, ops: Ops, reader: CheckpointReader, prefix: str, hidden: int
) -> Mamba2Block:
    m, rows = mixer, mixer.inner + mixer.xbc_width + mixer.heads
    if m.conv is None:
        name = f"{prefix}.conv1d"
        weight = reader.take(f"{name}.weight", (m.xbc_width, 1, m.width), torch.float32)
        bias = reader.take(f"{name}.bias", (m.xbc_width,), torch.float32) if m.conv_bias else None
        site = static_site(weight, [m.xbc_width], bias=bias, activation="silu")
    else:
        site = load_site(m.conv, (Member("xbc", prefix, m.xbc_width, hidden),), reader)
        assert site is not None
    weight = reader.take(f"{prefix}.in_proj.weight", (rows, hidden))
    bias = reader.take(f"{prefix}.in_proj.bias", (rows,)) if m.bias else None
    codes = sum(map(len, site.generators))
    if bias is not None:
        bias = torch.cat((bias, bias.new_zeros(codes)))
    parts = SSDParts(
        heads=m.heads,
        head_dim=m.head_dim,
        groups=m.groups,
        state_dim=m.state_dim,
        rate=-_vector(reader, f"{prefix}.A_log", m.heads).exp(),
        dt_bias=_vector(reader, f"{prefix}.dt_bias", m.heads),
        skip=_vector(reader, f"{prefix}.D", m.heads),
        norm=reader.take(f"{prefix}.norm.weight", (m.inner,)),
        eps=m.eps,
    )
    return Mamba2Block(
        ops,
        parts,
        ops.pack_linear(torch.cat((weight, *site.generators)), bias),
        Convolved(site.filters, slice(rows, rows + codes)),
        _linear(ops, reader, f"{prefix}.out_proj", hidden, m.inner, m.bias),
    )


@dataclass(frozen=True)
class _Delta:
    """A delta mixer's tensors in one order, whatever the checkpoint's."""

    rows: tuple[Tensor, ...]
    """Of q, k, v, gate, b, a."""
    site: ConvSite | None
    norm: str
    out: str
    generator: PackedLinear | None = None
    code: Tensor | None = None
    """Rows of the layer in front of `generator`."""


def _gated_delta(
    mixer: GatedDelta, ops: Ops, reader: CheckpointReader, prefix: str, hidden: int
) -> DeltaBlock:
    load = {"dynconv": _separate, "qwen3_next": _interleaved, "jet_nemotron": _jet}[mixer.layout]
    found = load(mixer, ops, reader, prefix, hidden)
    codes = found.site.generators if found.site else ()
    if found.code is not None:
        codes = (found.code,)
    start = sum(map(len, found.rows))
    conv = Convolved(
        found.site.filters if found.site else None, slice(start, start + sum(map(len, codes)))
    )
    convolved = {s.start for s in conv.filters.streams} if conv.filters else set[int]()
    starts = (0, mixer.key_width, 2 * mixer.key_width)
    q, k, v = (s not in convolved for s in starts)
    parts = DeltaParts(
        key_heads=mixer.key_heads,
        value_heads=mixer.value_heads,
        key_dim=mixer.key_dim,
        value_dim=mixer.value_dim,
        silu=(q, k, v),
        rate=-_vector(reader, f"{prefix}.A_log", mixer.value_heads).exp(),
        dt_bias=_vector(reader, f"{prefix}.dt_bias", mixer.value_heads),
        norm=reader.take(f"{prefix}.{found.norm}.weight", (mixer.value_dim,)),
        eps=mixer.eps,
        generator=found.generator,
    )
    return DeltaBlock(
        ops,
        parts,
        ops.pack_linear(_aligned(torch.cat((*found.rows, *codes))), None),
        conv,
        _linear(ops, reader, f"{prefix}.{found.out}", hidden, mixer.value_width, False),
    )


def _separate(
    mixer: GatedDelta, ops: Ops, reader: CheckpointReader, prefix: str, hidden: int
) -> _Delta:
    """A linear layer each, as flash-linear-attention stores them, with our convolutions."""
    members = (
        Member("q", prefix, mixer.key_width, hidden),
        Member("k", prefix, mixer.key_width, hidden),
        Member("v", prefix, mixer.value_width, hidden),
    )
    site = load_site(mixer.conv, members, reader)
    return _Delta(_projections(mixer, reader, prefix, hidden), site, "o_norm", "o_proj")


def _jet(mixer: GatedDelta, ops: Ops, reader: CheckpointReader, prefix: str, hidden: int) -> _Delta:
    """Filters of v from two linear layers with SiLU between them, every channel its own."""
    channels, width, inner = mixer.value_width, mixer.width, mixer.generator_hidden
    name = f"{prefix}.dynamic_conv1d.kernel_generator"
    code = reader.take(f"{name}.w1.weight", (inner, hidden))
    taps = reader.take(f"{name}.w2.weight", (channels * width, inner))
    bias = reader.take(f"{name}.w2.bias", (channels * width,))
    # Rows are (channel, tap), oldest tap first.
    taps = taps.unflatten(0, (channels, width)).flip(1).flatten(0, 1)
    bias = bias.unflatten(0, (channels, width)).flip(1).flatten()
    start = 2 * mixer.key_width
    filters = ConvFilter(
        "headwise",
        width,
        (Stream(start, start + channels, 0),),
        torch.zeros((width, channels), device=taps.device),
        head_size=1,
        activation="silu",
    )
    generator = ops.pack_linear(taps, bias)
    rows = _projections(mixer, reader, prefix, hidden)
    return _Delta(rows, ConvSite(filters, ()), "o_norm", "o_proj", generator, code)


def _interleaved(
    mixer: GatedDelta, ops: Ops, reader: CheckpointReader, prefix: str, hidden: int
) -> _Delta:
    """Per key head: q, k, and the values and gates that belong to it; then b and a likewise."""
    m = mixer
    group = m.value_heads // m.key_heads
    total = 2 * m.key_width + 2 * m.value_width
    sizes = (m.key_dim, m.key_dim, group * m.value_dim, group * m.value_dim)
    qkvz = reader.take(f"{prefix}.in_proj_qkvz.weight", (total, hidden))
    ba = reader.take(f"{prefix}.in_proj_ba.weight", (2 * m.value_heads, hidden))
    rows = (
        *(part.flatten(0, 1) for part in qkvz.unflatten(0, (m.key_heads, -1)).split(sizes, dim=1)),
        *(part.flatten(0, 1) for part in ba.unflatten(0, (m.key_heads, -1)).chunk(2, dim=1)),
    )
    widths = (m.key_width, m.key_width, m.value_width)
    weight = reader.take(f"{prefix}.conv1d.weight", (sum(widths), 1, m.width), torch.float32)
    return _Delta(rows, static_site(weight, widths, activation="silu"), "norm", "out_proj")


def _projections(
    mixer: GatedDelta, reader: CheckpointReader, prefix: str, hidden: int
) -> tuple[Tensor, ...]:
    widths = {"q": mixer.key_width, "k": mixer.key_width, "v": mixer.value_width}
    widths |= {"g": mixer.value_width, "b": mixer.value_heads, "a": mixer.value_heads}
    return tuple(
        reader.take(f"{prefix}.{name}_proj.weight", (rows, hidden)) for name, rows in widths.items()
    )


def _aligned(weight: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of 16, for rows of output that kernels can read wide."""
    return F.pad(weight, (0, 0, 0, -len(weight) % 16))


def _vector(reader: CheckpointReader, name: str, size: int) -> Tensor:
    return reader.take(name, (size,), torch.float32)


def _linear(
    ops: Ops, reader: CheckpointReader, name: str, rows: int, columns: int, has_bias: bool
) -> PackedLinear:
    weight = reader.take(f"{name}.weight", (rows, columns))
    return ops.pack_linear(weight, reader.take(f"{name}.bias", (rows,)) if has_bias else None)
