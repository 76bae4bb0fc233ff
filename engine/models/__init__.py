"""Model definitions: config.json to layers, weights to tensors. Knows no scheduler, no server."""

from __future__ import annotations

from ...kernels import Ops
from .config import ModelConfig, read_config
from .decoder import Decoder, load_decoder
from .errors import ModelError
from .forward_batch import PADDING, FlatBatch, ForwardBatch
from .registry import load_model
from .replay import replay_length
from .state import state_spec

__all__ = [
    "PADDING",
    "Decoder",
    "FlatBatch",
    "ForwardBatch",
    "ModelConfig",
    "ModelError",
    "Ops",
    "load_decoder",
    "load_model",
    "read_config",
    "replay_length",
    "state_spec",
]
