"""From an EngineConfig to an engine that is ready: the order of start-up, and its errors."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

from ..cache.residence import PAGE_TIME_EDGES
from .core import EngineCore
from .grammar import Grammars
from .messages import EngineInfo
from .models import ModelConfig, ModelError, load_model, read_config
from .models.mixers import Attention
from .resolve import ConfigError, mib, resolve_device, resolve_dtype, resolve_limits

if TYPE_CHECKING:
    from collections.abc import Generator

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
    with _memory_for("the weights"):
        model = _load(config, folder, device)
    limits = resolve_limits(config, model.state_spec, model.config.max_positions, device)
    with (
        _memory_for("the cache and the steps' graphs"),
        _progress(config, MofNCompleteColumn()) as bar,
    ):
        task = bar.add_task("Capturing graphs", total=None, visible=device.type == "cuda")
        core = EngineCore(
            model,
            limits,
            model.config.eos_token_ids,
            device,
            prefix_caching=config.prefix_caching,
            overlap=config.overlap and device.type == "cuda",
            graphs=config.cuda_graphs,
            grammars=_grammars(folder, model.config),
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
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
        page_time_edges=PAGE_TIME_EDGES,
        num_tails=core.stats().tails_total,
        eos_token_ids=model.config.eos_token_ids,
        device=_device_name(device),
        dtype=str(model.dtype).removeprefix("torch."),
        kv_bytes_per_token=spec.kv_bytes_per_token,
        conv_bytes_per_sequence=spec.conv_bytes_per_sequence(sizes.ring_len),
        recurrent_bytes_per_sequence=spec.recurrent_bytes,
        page_pool_bytes=limits.pool_bytes,
        weight_bytes=model.num_elements * model.dtype.itemsize,
        replay_length=spec.replay_length,
        conv=describe_conv(model.config),
    )
    return core, info


def _grammars(folder: Path, config: ModelConfig) -> Grammars | None:
    """None where there is no text, or no token to end one with."""
    if not config.eos_token_ids or not (folder / "tokenizer.json").exists():
        return None
    return Grammars(folder, config.vocab_size, config.eos_token_ids)


def describe_conv(config: ModelConfig) -> str:
    """The convolutions of a model in one phrase."""
    conv = config.conv
    if conv is None:
        built_in = sum(not isinstance(m, Attention) for m in config.mixers)
        return f"within the mixers of {built_in} layers" if built_in else "none"
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
    model = read_config(folder)
    dtype = resolve_dtype(config, model.dtype, device)
    if config.deterministic:
        _check_deterministic(config, model)
    with _progress(config, DownloadColumn()) as bar:
        task = bar.add_task("Loading weights", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done * dtype.itemsize, total=total * dtype.itemsize)

        adapter = Path(config.conv_adapter) if config.conv_adapter else None
        backend = "deterministic" if config.deterministic else config.backend
        return load_model(folder, dtype, device, backend, advance, adapter)


def _check_deterministic(config: EngineConfig, model: ModelConfig) -> None:
    if model.has_recurrence:
        raise ConfigError("deterministic: not for models with recurrent layers")
    if config.backend != "auto":
        raise ConfigError(f"deterministic: not with backend {config.backend}")


def _progress(config: EngineConfig, counter: ProgressColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), counter, TimeElapsedColumn())
    return Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not config.progress
    )


@contextmanager
def _memory_for(what: str) -> Generator[None]:
    """Says what did not fit where the device's memory ends."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
        raise ConfigError(
            f"memory: the device has no room for {what} ({mib(free)} free): "
            "lower --memory, --max-num-seqs or --max-batch-tokens"
        ) from error


def _trim_heap() -> None:
    """Gives back what loading has freed; glibc keeps the holes between packed weights otherwise."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"
