"""What Python knows of the native kernels: their C signatures and which tensors they take."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int64, c_long, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ops import PackedLinear

if TYPE_CHECKING:
    from .filters import ConvFilter
    from .ops import QKNorm

PANEL_PAIR = 32
"""Outputs of a linear are padded to a multiple of this."""
MAX_GROUP = 48
"""Most query heads that share a kv head."""
MAX_HEAD = 256

NORM_MODES = {"head": 1, "full": 2}
_KINDS = {"static": 0, "lowrank": 1, "headwise": 2}

threads = torch.get_num_threads


@dataclass(frozen=True)
class PanelLinear(PackedLinear):
    """Weights in the native layout, flat; `bias` is float32, padded with zeros to whole panels."""

    address: int
    bias_address: int | None


class ConvRecord(Structure):
    """`struct conv` of native/conv.c."""

    _fields_ = (
        *((name, c_void_p) for name in ("x", "z", "y", "ring")),
        *((name, c_long) for name in ("x_stride", "z_stride", "y_stride", "ring_stride")),
        *((name, c_long) for name in ("kind", "width", "rank", "head_size", "silu", "channels")),
        *((name, c_void_p) for name in ("taps", "bias", "up", "streams")),
        ("stream_count", c_long),
        *((name, c_void_p) for name in ("starts", "offsets", "slots", "ring_rows")),
        *((name, c_long) for name in ("seqs", "rows", "ring_len")),
        ("scale", c_float),
    )


def conv_record(filters: ConvFilter) -> tuple[ConvRecord, object]:
    """The part of `struct conv` that no step changes, and what has to live as long as it."""
    streams = [value for s in filters.streams for value in (s.start, s.stop, s.z_start)]
    array = (c_int64 * len(streams))(*streams)
    record = ConvRecord(
        kind=_KINDS[filters.kind],
        width=filters.width,
        rank=filters.rank,
        head_size=filters.head_size,
        silu=filters.activation == "silu",
        channels=filters.channels,
        taps=filters.static.data_ptr(),
        bias=None if filters.bias is None else filters.bias.data_ptr(),
        up=None if filters.up is None else filters.up.data_ptr(),
        streams=ctypes.addressof(array),
        stream_count=len(filters.streams),
        scale=filters.scale,
    )
    return record, (filters, array)


def is_norm_weight(weight: Tensor) -> bool:
    """Whether norm kernels take this weight."""
    return weight.dtype in (torch.bfloat16, torch.float32) and weight.is_contiguous()


def are_pages(k_pages: Tensor, v_pages: Tensor) -> bool:
    """Whether kernels can address these pages."""
    return (
        k_pages.dtype == torch.bfloat16
        and k_pages.stride() == v_pages.stride()
        and k_pages.stride(3) == 1
        and k_pages.shape[3] <= 512
    )


def attends(q_heads: int, kv_heads: int, head: int) -> bool:
    """Whether the attention kernel takes these heads."""
    return head % 16 == 0 and head <= MAX_HEAD and q_heads // kv_heads <= MAX_GROUP


def is_qk_norm(norm: QKNorm, filters: ConvFilter | None) -> bool:
    """Whether the kernel that rotates and stores can also do this norm."""
    return (
        (filters is None or norm.order == "conv_first")
        and is_norm_weight(norm.q)
        and is_norm_weight(norm.k)
        and norm.q.dtype == norm.k.dtype
    )


def convolves(filters: ConvFilter, ring: Tensor) -> bool:
    """Whether the convolution kernel takes this filter and ring."""
    return (
        ring.dtype == torch.bfloat16
        and ring.stride(2) == 1
        and ring.stride(0) == ring.shape[1] * ring.stride(1)
        and filters.width <= 8
        and filters.rank <= 64
        and filters.static.dtype == torch.float32
        and filters.static.is_contiguous()
        and (filters.up is None or (filters.up.dtype == ring.dtype and filters.up.is_contiguous()))
        and (filters.bias is None or filters.bias.dtype == torch.float32)
    )


def declare(library: ctypes.CDLL) -> None:
    """Tells ctypes the signatures of the single ops."""
    p, n, f = c_void_p, c_long, c_float
    signatures = {
        "pack": (p, n, p, n, n, n),
        "linear": (p, n, p, p, p, n, n, n, n),
        "embed": (p, p, p, n, n),
        "rms_norm": (p, n, p, p, p, n, f, p, n, n, n),
        "silu_mul": (p, n, p, n, n, n),
        "rope_write": (p, n, n, n, n, p, n, n, n, p, p, n, f, p, p, p, n, n, n, n, p, n, n),
        "conv": (POINTER(ConvRecord), n),
        "attention": (p, p, p, p, p, p, n, p, n, n, n, n, n, n, n, n, f, n, n, n),
    }
    for name, arguments in signatures.items():
        function = getattr(library, f"convserve_{name}")
        function.argtypes = arguments
        function.restype = c_long if name == "attention" else None
