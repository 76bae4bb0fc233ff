"""From a folder to a model on a device: the one call the engine makes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from ...kernels import select_ops
from .config import read_config
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
    backend: Literal["auto", "reference"] = "auto",
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Decoder:
    """Reads config and weights of a folder.

    Raises:
        ModelError: one line naming what is wrong.
    """
    config = read_config(folder)
    return load_decoder(folder, config, select_ops(device, backend), dtype, device, on_progress)
