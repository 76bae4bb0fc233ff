"""From an EngineConfig to an engine that is ready: the order of start-up, and its errors."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

from .core import EngineCore
from .messages import EngineInfo
from .models import ModelConfig, ModelError, load_model, read_config
from .resolve import ConfigError, resolve_device, resolve_dtype, resolve_limits

if TYPE_CHECKING:
    from .config import EngineConfig
    from .models import Decoder


def start_engine(config: EngineConfig) -> tuple[EngineCore, EngineInfo]:
    """Loads the model, sizes and allocates the cache.

    Raises:
        ModelError, ConfigError: one line fit for a person.
    """
    folder = Path(config.model)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    if config.threads < 0:
        raise ConfigError(f"threads: {config.threads} cannot be negative")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = resolve_device(config)
    model = _load(config, folder, device)
    limits = resolve_limits(config, model.state_spec, model.config.max_positions, device)
    core = EngineCore(
        model,
        limits,
        model.config.eos_token_ids,
        device,
        prefix_caching=config.prefix_caching,
        graphs=config.cuda_graphs,
    )
    gc.collect()
    _trim_heap()
    # Nothing loaded so far ever becomes garbage; keep the collector from walking it.
    gc.freeze()
    sizes, spec = limits.sizes, model.state_spec
    info = EngineInfo(
        model=str(folder),
        model_type=model.config.model_type,
        vocab_size=model.config.vocab_size,
        max_model_len=limits.max_model_len,
        max_num_seqs=sizes.num_slots,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        eos_token_ids=model.config.eos_token_ids,
        device=_device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_bytes_per_token=spec.kv_bytes_per_token,
        conv_bytes_per_sequence=spec.conv_bytes_per_sequence(sizes.ring_len),
        page_pool_bytes=limits.pool_bytes,
        weight_bytes=model.num_elements * model.dtype.itemsize,
        replay_length=spec.replay_length,
        conv=describe_conv(model.config),
    )
    return core, info


def describe_conv(config: ModelConfig) -> str:
    """The convolutions of a model in one phrase."""
    conv = config.conv
    if conv is None:
        return "none"
    size = {
        "static": "",
        "lowrank": f", rank {conv.rank}",
        "headwise": f", head size {conv.head_size}",
    }[conv.kind]
    count = config.num_layers if conv.layers is None else len(conv.layers)
    return (
        f"{conv.kind}, width {conv.width}{size}, after {' '.join(conv.placement)} in {count} of "
        f"{config.num_layers} layers"
    )


def _load(config: EngineConfig, folder: Path, device: torch.device) -> Decoder:
    dtype = resolve_dtype(config, read_config(folder).dtype, device)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not config.progress
    ) as bar:
        task = bar.add_task("Loading weights", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done * dtype.itemsize, total=total * dtype.itemsize)

        return load_model(folder, dtype, device, config.backend, advance)


def _trim_heap() -> None:
    """Gives back what loading has freed; glibc keeps the holes between packed weights otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
