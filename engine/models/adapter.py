"""Convolutions trained for a plain model and kept apart from it: read, checked, laid over the base.

An adapter is a folder of two files: `adapter.json` says what base it was trained on and what the
convolutions are, `adapter.safetensors` holds their tensors under the checkpoint format's names.
Knows nothing of how weights become a model: it changes the config and names a file to read along.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from .checkpoint import CheckpointReader
from .config import ModelConfig, read_config
from .conv_config import parse_conv
from .errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

CONFIG = "adapter.json"
WEIGHTS = "adapter.safetensors"
FORMAT = "convserve-conv-adapter-1"
PLAIN = ("llama", "olmoe", "qwen3", "qwen3_moe")
"""Model types that an adapter may be for."""


@dataclass(frozen=True)
class ConvAdapter:
    """What `adapter.json` says."""

    folder: Path
    base_sha256: str
    """`base_identity` of the folder it was trained on."""
    conv: dict[str, Any]
    """The `conv` object of a dynconv config."""

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / WEIGHTS


def read_adapter(folder: Path) -> ConvAdapter:
    """Reads an adapter's description.

    Raises:
        ModelError: no such folder, no adapter in it, or one of another format.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: not a conv adapter (no {CONFIG})") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else raw
        raise ModelError(f"{path}: format {found!r} is not supported (supported: {FORMAT})")
    base, conv = raw.get("base_sha256"), raw.get("conv")
    if not isinstance(base, str) or not isinstance(conv, dict):
        raise ModelError(f"{path}: needs base_sha256 (a string) and conv (an object)")
    return ConvAdapter(folder, base, conv)


def read_adapted(folder: Path, conv_adapter: str | Path | None) -> tuple[ModelConfig, Path | None]:
    """The config of a folder, and the file of the adapter laid over it, if one is named.

    Raises:
        ModelError: as `read_config`, `read_adapter` and `adapted_config`.
    """
    config = read_config(folder)
    if not conv_adapter:
        return config, None
    adapter = read_adapter(Path(conv_adapter))
    return adapted_config(folder, config, adapter), adapter.weights


def adapted_config(base: Path, config: ModelConfig, adapter: ConvAdapter) -> ModelConfig:
    """The config of `base` with the adapter's convolutions.

    Raises:
        ModelError: the adapter is for other weights, the base has convolutions of its own, or the
            adapter's do not fit it.
    """
    path = adapter.folder / CONFIG
    if config.conv is not None:
        raise ModelError(f"{base}: has convolutions of its own, so {path} cannot be laid over it")
    if config.model_type not in PLAIN:
        raise ModelError(f"{path}: cannot be laid over a {config.model_type} ({', '.join(PLAIN)})")
    found = base_identity(base)
    if found != adapter.base_sha256:
        raise ModelError(
            f"{path}: is for a base with weights {adapter.base_sha256[:16]}, "
            f"and those of {base} are {found[:16]}"
        )
    try:
        conv = parse_conv(adapter.conv, config.num_layers)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    if conv is None:
        raise ModelError(f"{path}: conv.kind none adds nothing")
    if config.experts and {"gate", "up", "down"} & set(conv.placement):
        raise ModelError(f"{path}: gate, up and down have no sequence inside experts")
    return replace(config, model_type="dynconv", conv=conv)


def base_identity(folder: Path) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a folder's tensors, however it is sharded.

    Raises:
        ModelError: the weights cannot be read.
    """
    digest = hashlib.sha256()
    with CheckpointReader(folder, torch.float32, torch.device("cpu")) as reader:
        for name in sorted(reader.names):
            tensor = reader.stored(name)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_adapter(
    out: Path, base: Path, conv: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes convolutions trained on the folder `base` as an adapter, in bfloat16.

    Raises:
        ModelError: the result would not load on its base.
    """
    out.mkdir(parents=True, exist_ok=True)
    adapter = ConvAdapter(out, base_identity(base), dict(conv))
    adapted_config(base, read_config(base), adapter)
    kept = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in tensors.items()}
    save_file(kept, adapter.weights, metadata={"format": "pt"})
    adapter.weights.chmod(0o644)  # safetensors makes files that only their owner reads
    described = {"format": FORMAT, "base_sha256": adapter.base_sha256, "conv": adapter.conv}
    (out / CONFIG).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
