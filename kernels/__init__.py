"""Public ops of the kernel room: the flat-batch contract, its reference, and its backends."""

from __future__ import annotations

from .backend import select_ops
from .batch import PADDING, FlatBatch
from .blocks import AttentionParts, Convolved, MLPParts
from .filters import ConvFilter, Stream
from .ops import Ops
from .recurrent import DeltaParts, SSDParts
from .weights import PackedLinear, QKNorm

__all__ = [
    "PADDING",
    "AttentionParts",
    "ConvFilter",
    "Convolved",
    "DeltaParts",
    "FlatBatch",
    "MLPParts",
    "Ops",
    "PackedLinear",
    "QKNorm",
    "SSDParts",
    "Stream",
    "select_ops",
]
