"""The engine: schedules, batches and runs a model over paged and position-addressed state.

`LLM`, `SamplingParams`, `Grammar` and `Completion` are the offline interface. They load on first
use, so that the server, which only talks to an engine process, never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llm import LLM, Completion
    from .messages import Grammar, SamplingParams

__all__ = ["LLM", "Completion", "Grammar", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "Completion"):
        from . import llm

        return getattr(llm, name)
    if name in ("Grammar", "SamplingParams"):
        from . import messages

        return getattr(messages, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
