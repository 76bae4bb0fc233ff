"""State of sequences: KV pages, conv rings, and the books over them.

Other rooms use `CacheManager` (the books) and `allocate` (the tensors); models read `specs` alone.
"""

from __future__ import annotations

from .manager import CacheManager, CacheSizes, Copies
from .specs import AttentionSpec, ConvSpec, LayerSpec, LayerState, StateSpec
from .storage import allocate, apply_copies

__all__ = [
    "AttentionSpec",
    "CacheManager",
    "CacheSizes",
    "ConvSpec",
    "Copies",
    "LayerSpec",
    "LayerState",
    "StateSpec",
    "allocate",
    "apply_copies",
]
