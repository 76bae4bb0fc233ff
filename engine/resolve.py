"""Every "auto" of an EngineConfig decided: device, dtype, and how much state fits in memory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..cache import CacheSizes

if TYPE_CHECKING:
    from ..cache import StateSpec
    from .config import EngineConfig

AUTO_SHARE = {"cpu": 0.25, "cuda": 0.9}
"""Share of the free memory that `memory=auto` may take."""

TAIL_SHARE = 0.01
"""Share of the memory budget that `conv_tail_memory=auto` may take."""

SNAPSHOT_SHARE = 0.1
"""The same for a model with recurrent state, whose prefixes are usable where a tail is stored."""

CPU_BATCH_TOKENS = 256
CUDA_BATCH_TOKENS = 2048


class ConfigError(ValueError):
    """An engine option cannot be satisfied: one line naming the option."""


@dataclass(frozen=True)
class Limits:
    """What one engine can hold and do per step."""

    sizes: CacheSizes
    max_model_len: int
    max_batch_tokens: int
    pool_bytes: int


def resolve_device(config: EngineConfig) -> torch.device:
    """The device to run on.

    Raises:
        ConfigError: cuda asked for and not there.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device: cuda was asked for but torch sees no CUDA device")
    name = ("cuda" if has_cuda else "cpu") if config.device == "auto" else config.device
    return torch.device(name)


def resolve_dtype(config: EngineConfig, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and state.

    auto: what the checkpoint says; on a CPU without bfloat16 instructions, float32.
    """
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if config.dtype != "auto":
        if config.dtype == "float16" and device.type == "cpu":
            raise ConfigError("dtype: float16 is not supported on a CPU (bfloat16 or float32)")
        return names[config.dtype]
    if device.type == "cpu":
        fast = checkpoint in ("bfloat16", "float16") and has_fast_bfloat16()
        return torch.bfloat16 if fast else torch.float32
    return names.get(checkpoint, torch.bfloat16)


def has_fast_bfloat16() -> bool:
    """The CPU multiplies bfloat16 faster than float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def parse_memory(text: str, free: int, share: float, option: str = "memory") -> int:
    """Bytes meant by a memory option: auto, a percentage of what is free, or a size.

    Raises:
        ConfigError: none of these.
    """
    if text == "auto":
        return int(free * share)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[kmgt]i?b?|b)?", text.strip().lower())
    if match is None:
        raise ConfigError(f"{option}: {text!r} is not auto, a percentage or a size (such as 2GiB)")
    number, unit = float(match[1]), match[2] or "b"
    if unit == "%":
        if not 0 < number <= 100:
            raise ConfigError(f"{option}: {text!r} must be above 0% and at most 100%")
        return int(free * number / 100)
    power = "bkmgt".index(unit[0])
    base = 1000 if len(unit) == 2 and unit[1] == "b" else 1024
    return int(number * base**power)


def resolve_limits(
    config: EngineConfig, spec: StateSpec, max_positions: int, device: torch.device
) -> Limits:
    """How many pages and slots to allocate.

    Raises:
        ConfigError: an option out of range, or a model that does not fit, saying by how much.
    """
    page_size = config.page_size
    if not 1 <= page_size <= 256 or page_size & (page_size - 1):
        raise ConfigError(f"page_size: {page_size} is not a power of two in 1..256")
    if config.max_num_seqs < 1:
        raise ConfigError(f"max_num_seqs: {config.max_num_seqs} must be at least 1")
    if config.max_batch_tokens < 0 or config.max_model_len < 0:
        raise ConfigError("max_batch_tokens and max_model_len cannot be negative")
    if config.max_model_len > max_positions:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the model's {max_positions}"
        )
    wanted_len = config.max_model_len or max_positions
    free = free_memory(device)
    budget = parse_memory(config.memory, free, AUTO_SHARE[device.type])
    ring_len = spec.ring_len()
    slots = spec.slot_bytes(ring_len) * (config.max_num_seqs + 1)
    page_bytes = spec.kv_bytes_per_token * page_size
    tails = resolve_tails(config, spec, budget)
    # The reserved page comes out of the budget too.
    pages = (budget - slots - tails * spec.tail_bytes) // max(page_bytes, 1) - 1
    least = -(-(config.max_model_len or min(max_positions, 256)) // page_size)
    if pages < least:
        short = (least + 1) * page_bytes + slots - budget
        raise ConfigError(
            f"memory: the budget of {mib(budget)} is {mib(short)} too small for one sequence of "
            f"{least * page_size} tokens ({spec.kv_bytes_per_token} bytes of KV a token) and conv "
            f"rings and recurrent state of {config.max_num_seqs} sequences ({mib(slots)})"
        )
    if config.memory == "auto" or not page_bytes:  # without KV, a page is an entry in the books
        pages = min(pages, config.max_num_seqs * -(-wanted_len // page_size))
    sizes = CacheSizes(pages, page_size, config.max_num_seqs, ring_len, tails)
    default_rows = CPU_BATCH_TOKENS if device.type == "cpu" else CUDA_BATCH_TOKENS
    return Limits(
        sizes=sizes,
        max_model_len=min(wanted_len, sizes.capacity),
        max_batch_tokens=config.max_batch_tokens or max(default_rows, config.max_num_seqs),
        pool_bytes=(pages + 1) * page_bytes + slots + tails * spec.tail_bytes,
    )


def resolve_tails(config: EngineConfig, spec: StateSpec, budget: int) -> int:
    """How many tails to make room for.

    Raises:
        ConfigError: `conv_tail_memory` is not a size, or takes the whole budget.
    """
    if not config.prefix_caching or not spec.tail_bytes:
        return 0
    text = config.conv_tail_memory
    share = TAIL_SHARE if spec.replay_length is not None else SNAPSHOT_SHARE
    room = parse_memory(text, budget, share, "conv_tail_memory")
    if room >= budget:
        raise ConfigError(f"conv_tail_memory: {text!r} leaves nothing of {mib(budget)} for pages")
    return room // spec.tail_bytes


def mib(count: int) -> str:
    """Bytes in words."""
    return f"{count / 2**20:,.0f} MiB"


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now, container limits included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    info = Path("/proc/meminfo")
    if info.exists():
        match = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text(encoding="ascii"))
        free = int(match[1]) * 1024 if match else free
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(free, 0)
