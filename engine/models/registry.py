"""From a folder to a model on a device: the one call the engine makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ...kernels import select_ops
from .adapter import read_adapted
from .decoder import load_decoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from .decoder import Decoder


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    backend: Literal["auto", "reference", "deterministic"] = "auto",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
    conv_adapter: Path | None = None,
) -> Decoder:
    """Reads config and weights of a folder, and lays the convolutions of an adapter over it.

    Raises:
        ModelError: one line naming what is wrong.
    """
    config, adapter = read_adapted(folder, conv_adapter)
    ops = select_ops(device, backend)
    return load_decoder(folder, config, ops, dtype, device, on_progress, adapter)
