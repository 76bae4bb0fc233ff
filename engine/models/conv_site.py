"""Convolution sites: the filters of one convolved tensor, loaded into the one internal form.

A site is the output of one merged linear layer (q, k, v together; o; gate and up; down) or a
block's input. This file alone knows how checkpoints store filters; past it, tap 0 is the current
token and filters are [W, D] side by side (kernels/filters.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ...kernels import ConvFilter, Stream
from .errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .checkpoint import CheckpointReader
    from .conv_config import ConvConfig, Place


@dataclass(frozen=True)
class Member:
    """One linear layer that may be convolved."""

    place: Place
    prefix: str
    """Module that holds it: `model.layers.0.self_attn` or `....mlp`."""
    width: int
    """D, its output channels."""
    generator_width: int
    """Channels that its filter generator reads."""


@dataclass(frozen=True)
class ConvSite:
    """The filters of a site and the generators that feed them."""

    filters: ConvFilter
    generators: tuple[Tensor, ...]
    """[Z_i, D_in] rows of each stream's generator, in stream order; empty for static filters."""


def load_site(
    config: ConvConfig | None, members: tuple[Member, ...], reader: CheckpointReader
) -> ConvSite | None:
    """Loads the site of a merged linear whose outputs are the members', in order.

    Returns None if none of them is convolved.
    """
    if config is None or not set(config.placement) & {m.place for m in members}:
        return None
    streams: list[Stream] = []
    generators: list[Tensor] = []
    static: list[Tensor] = []
    ups: list[Tensor] = []
    biases: list[Tensor] = []
    start = z = 0
    for member in members:
        stop = start + member.width
        if member.place in config.placement:
            loaded = _LOADERS[config.kind](config, member, reader)
            streams.append(Stream(start, stop, z))
            static.append(loaded.static)
            if loaded.generator is not None:
                generators.append(loaded.generator)
                z += len(loaded.generator)
            if loaded.up is not None:
                ups.append(loaded.up)
            if loaded.bias is not None:
                biases.append(loaded.bias)
        start = stop
    taps = torch.cat(static, dim=1)
    if config.residual:
        taps[0] += 1
    filters = ConvFilter(
        kind=config.kind,
        width=config.width,
        streams=tuple(streams),
        static=taps,
        up=torch.cat(ups, dim=2) if ups else None,
        head_size=config.head_size,
        bias=torch.cat(biases) if biases else None,
        scale=config.output_scale,
        activation=config.activation,
    )
    return ConvSite(filters, tuple(generators))


def static_site(
    weight: Tensor,
    widths: Sequence[int],
    *,
    residual: bool = False,
    bias: Tensor | None = None,
    activation: Literal["silu"] | None = None,
) -> ConvSite:
    """The site of one Conv1d over streams of these widths, side by side.

    Args:
        weight: [D, 1, W] float32, oldest tap first. bias: [D] float32.
    """
    taps = weight[:, 0].T.flip(0).contiguous()
    if residual:
        taps[0] += 1
    filters = ConvFilter(
        "static",
        taps.shape[0],
        _streams(widths),
        taps,
        bias=bias,
        activation=activation,
    )
    return ConvSite(filters, ())


def _streams(widths: Sequence[int]) -> tuple[Stream, ...]:
    ends = list(itertools.accumulate(widths))
    return tuple(Stream(end - width, end, 0) for end, width in zip(ends, widths, strict=True))


@dataclass(frozen=True)
class _Loaded:
    static: Tensor  # [W, D] float32
    generator: Tensor | None = None  # [Z, D_in]
    up: Tensor | None = None  # [R, W, D]
    bias: Tensor | None = None  # [D] float32


def _load_static(config: ConvConfig, member: Member, reader: CheckpointReader) -> _Loaded:
    """Conv1d weight [D, 1, W], oldest tap first, always."""
    name = f"{member.prefix}.{member.place}_conv1d"
    weight = reader.take(f"{name}.weight", (member.width, 1, config.width), torch.float32)
    bias = reader.take(f"{name}.bias", (member.width,), torch.float32) if config.bias else None
    return _Loaded(weight[:, 0].T.flip(0).contiguous(), bias=bias)


def _load_lowrank(config: ConvConfig, member: Member, reader: CheckpointReader) -> _Loaded:
    name, width, channels = _module(member), config.width, member.width
    generator = reader.take(f"{name}.proj_in.weight", (config.rank, member.generator_width))
    up = reader.take(f"{name}.proj_out", (config.rank, width * channels))
    up = _recent_first(up.view(config.rank, width, channels), config, axis=1)
    static = _bias_taps(config, f"{name}.proj_out_bias", channels, reader)
    return _Loaded(static.to(up.device), generator, up.contiguous())


def _load_headwise(config: ConvConfig, member: Member, reader: CheckpointReader) -> _Loaded:
    name, width = _module(member), config.width
    if member.width % config.head_size:
        raise ModelError(
            f"conv.head_size {config.head_size} does not divide the {member.width} channels of "
            f"{member.place}"
        )
    heads = member.width // config.head_size
    rows = reader.take(f"{name}.weight_proj.weight", (heads * width, member.generator_width))
    rows = _recent_first(rows.view(heads, width, -1), config, axis=1).flatten(0, 1)
    static = _bias_taps(config, f"{name}.static_w", member.width, reader)
    return _Loaded(static.to(rows.device), rows.contiguous())


def _bias_taps(config: ConvConfig, name: str, channels: int, reader: CheckpointReader) -> Tensor:
    """The filter's input-independent part [W, D], zero if the model has none."""
    if not config.bias:
        return torch.zeros(config.width, channels)
    taps = reader.take(name, (config.width, channels), torch.float32)
    return _recent_first(taps, config, axis=0).contiguous()


def _recent_first(taps: Tensor, config: ConvConfig, axis: int) -> Tensor:
    return taps.flip(axis) if config.tap_order == "oldest_first" else taps


def _module(member: Member) -> str:
    return f"{member.prefix}.dynamic_conv_{member.place}"


_LOADERS = {"static": _load_static, "lowrank": _load_lowrank, "headwise": _load_headwise}
