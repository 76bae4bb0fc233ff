"""State of sequences: KV pages, conv rings and tails, and the books over them.

Other rooms use `CacheManager` (the books) and `CacheStorage` (the tensors); models read `specs`.
"""

from __future__ import annotations

from .copies import Copies
from .manager import Admission, CacheManager, CacheSizes
from .specs import AttentionSpec, ConvSpec, LayerSpec, LayerState, StateSpec
from .storage import CacheStorage

__all__ = [
    "Admission",
    "AttentionSpec",
    "CacheManager",
    "CacheSizes",
    "CacheStorage",
    "ConvSpec",
    "Copies",
    "LayerSpec",
    "LayerState",
    "StateSpec",
]
