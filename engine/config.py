"""How an engine is set up: the options a user gives."""

from __future__ import annotations

from typing import Literal

import msgspec


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Engine options, spelled as the flags of `convserve serve` and arguments of `LLM`.

    Immutable. "auto" and None are decided once at start (`resolve.py`) into a `ResolvedConfig`.
    """

    model: str
    """A folder in Hugging Face layout."""
    conv_adapter: str = ""
    """A folder of convolutions trained for this model and kept apart from it; empty for none."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_num_seqs: int = 64
    """Most sequences that run at once (conv-ring slots)."""
    max_batch_tokens: int = 0
    """Most token rows in one step; 0 lets the engine choose for the device."""
    max_model_len: int = 0
    """Most tokens of prompt and output together; 0 for the model's context length."""
    memory: str = "auto"
    """Budget of the page pool: bytes (`2GiB`), a share of free memory (`50%`), or auto."""
    page_size: int = 16
    """Tokens per KV page; a power of two, 1..256."""
    prefix_caching: bool = True
    """Share the state of prompts that begin alike."""
    conv_tail_memory: str = "auto"
    """Budget of conv windows stored at page boundaries, out of `memory`: bytes or a share of it;
    auto is 1%. Without a stored one, a window is rebuilt by running a few tokens again."""
    cuda_graphs: bool = True
    """On a GPU, replay captured graphs of whole steps."""
    overlap: bool = True
    """On a GPU, launch a step before the tokens of the one before it are read. Off for debugging:
    the tokens are the same."""
    deterministic: bool = False
    """The same bits whatever else is in the batch and wherever prompts are cut, at the cost of
    speed: one way to multiply and one to attend, whatever the number of rows."""
    threads: int = 0
    """CPU threads of the engine; 0 for all cores."""
    backend: Literal["auto", "reference"] = "auto"
    """Kernel backend; `reference` forces plain torch."""
    progress: bool = False
    """Show progress bars on stderr while starting."""
