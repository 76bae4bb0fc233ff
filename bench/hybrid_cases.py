"""What the hybrid benches share: published shapes, random weights, timing, cases that may fail."""

from __future__ import annotations

import signal
import statistics
import traceback
from typing import TYPE_CHECKING, Any

import torch
from captured import captured

if TYPE_CHECKING:
    from collections.abc import Callable

BANDWIDTH = 3.108e12
"""Bytes per second that a read of an H100's memory reaches."""

JET_ATTENTION = {14: "attn", 19: "attn", 20: "swa", 21: "swa"}
JET: dict[str, Any] = {
    "model_type": "jet_nemotron",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "layer_types": [JET_ATTENTION.get(i, "jet") for i in range(28)],
    "efficient_attention_config": {
        "jet": {"expand_v": 2.6666666667, "num_heads": 12, "head_dim": 96, "conv_size": 4},
        "swa": {"window_size": 1152},
    },
}
LFM2: dict[str, Any] = {
    "model_type": "lfm2",
    "vocab_size": 65536,
    "hidden_size": 2048,
    "intermediate_size": 12288,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
}
START = 100
"""Tokens before the step of a single layer."""

SHAPES = {"Jet-Nemotron-2B": JET, "LFM2-1.2B": LFM2}


class RandomReader:
    """Stands where a CheckpointReader does, with random weights of any name."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self.total_elements = 0

    def __contains__(self, name: str) -> bool:
        return False

    def take(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """A random tensor, scaled so that activations keep their size."""
        self.total_elements += torch.Size(shape).numel()
        dtype = dtype or self._dtype
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=self._device)
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
        return torch.randn(shape, dtype=dtype, device=self._device) * scale


def graph_us(calls: list[Callable[[], Any]]) -> float:
    """Microseconds a call, chained in one graph: the median of some replays."""
    return statistics.median(graph_times(calls, 7)) / len(calls)


def graph_times(calls: list[Callable[[], Any]], replays: int) -> list[float]:
    """Microseconds of each replay of a graph of all calls."""
    graph = captured(calls)
    times: list[float] = []
    for turn in range(replays + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn > 1:
            times.append(begin.elapsed_time(end) * 1e3)
    return times


def attempt(name: str, part: Callable[[], Any], seconds: float = 60) -> Any:
    """Runs a part; one that fails or takes too long is printed and does not stop the others."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, stop)
    before, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return part()
    except Exception:
        print(name, "FAILED\n", traceback.format_exc(limit=-3), flush=True)
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, before)
        signal.signal(signal.SIGALRM, previous)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
