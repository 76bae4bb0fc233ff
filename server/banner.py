"""What the server says when it is ready: what it serves, where, and what fits.

Knows nothing of how it listens.
"""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..engine.config import EngineConfig
    from ..engine.messages import EngineInfo
    from .settings import ServerSettings


def banner(info: EngineInfo, engine: EngineConfig, settings: ServerSettings, url: str) -> list[str]:
    """Lines for the person who started it."""
    whole = min(info.num_pages * info.page_size // info.max_model_len, info.max_num_seqs)
    sharing = "on" if engine.prefix_caching else "off"
    lines = [
        f"convserve {importlib.metadata.version('convserve')} serves "
        f"{', '.join(settings.model_names)} at {url}",
        f"  model   {info.model_type}, conv {info.conv}, {_size(info.weight_bytes)} of weights",
        f"  device  {info.device}, {info.dtype}",
        f"  cache   {info.num_pages} pages of {info.page_size} tokens "
        f"({_size(info.page_pool_bytes)}, {_size(info.kv_bytes_per_token)} a token), "
        f"prefix caching {sharing}",
    ]
    state = {
        "convolutions": info.conv_bytes_per_sequence,
        "recurrence": info.recurrent_bytes_per_sequence,
    }
    if any(state.values()):
        parts = " and ".join(f"{_size(size)} of {what}" for what, size in state.items() if size)
        lines.append(
            f"  state   {info.max_num_seqs} slots, each {parts}; "
            f"{info.num_tails} tails for shared prefixes"
        )
    lines.append(
        f"  fits    {info.max_num_seqs} sequences at once, {whole} of them at the full "
        f"{info.max_model_len} tokens"
    )
    if settings.page and not url.startswith("unix:"):
        lines.append(f"  page    {url}/")
    return lines


def _size(number: int) -> str:
    """Bytes for a person."""
    value, unit = float(number), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
