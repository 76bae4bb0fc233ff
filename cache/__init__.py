"""State of sequences: KV pages, conv rings, recurrent states, tails, and the books over them.

Other rooms use `CacheManager` (the books) and `CacheStorage` (the tensors); models read `specs`.
"""

from __future__ import annotations

from .copies import Copies
from .manager import CacheManager
from .records import Admission, CacheSizes
from .specs import AttentionSpec, ConvSpec, LayerSpec, LayerState, RecurrentSpec, StateSpec
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
    "RecurrentSpec",
    "StateSpec",
]
