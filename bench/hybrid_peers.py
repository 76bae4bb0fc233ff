"""Other people's kernels for hybrid layers, as far as they are there: none of them is shipped here.

flash-linear-attention is imported if it is installed or lies on PYTHONPATH (the wheels `fla-core`,
`flash-linear-attention` and `einops` unpacked into one folder are enough). NVIDIA's Jet block is
read from the folder that CONVSERVE_JET names: `jetai/modeling/hf` of NVlabs/Jet-Nemotron, of which
`jet_block.py`, `dynamic_conv.py` and the `dconv_*.py` are used. What is absent is said in words.
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from convserve.engine.models.layers import Norm
from hybrid_cases import START

if TYPE_CHECKING:
    from convserve.cache.specs import LayerState
    from convserve.kernels import FlatBatch
    from torch import Tensor

VARIABLE = "CONVSERVE_JET"


LAUNCHES: dict[str, list[dict[str, int]]] = {
    "chunk_local_cumsum_scalar_kernel": [{"num_warps": 4}],
    "l2norm_fwd_kernel": [{"BT": 16, "num_warps": 4}],
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": [
        {"BK": 64, "num_warps": 1},
        {"BK": 64, "num_warps": 4},
    ],
    "recompute_w_u_fwd_kernel": [{"num_warps": 4, "num_stages": 3}],
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": [
        {"BV": 32, "num_warps": 4, "num_stages": 2},
        {"BV": 64, "num_warps": 4, "num_stages": 3},
    ],
    "chunk_fwd_kernel_o": [
        {"BK": 128, "BV": 128, "num_warps": 8},
        {"BK": 64, "BV": 64, "num_warps": 4},
    ],
    "chunk_fwd_kernel_h": [{"BK": 64, "BV": 64, "num_warps": 4, "num_stages": 3}],
    "fused_recurrent_fwd_kernel": [{"num_warps": 4}],
}
"""Launch shapes of fla's kernels to choose among; all of theirs take minutes to try."""


def flash_linear_attention() -> Any | None:
    """The module `fla.ops`, its kernels' launch shapes cut down; None and a line that says why."""
    try:
        ops = importlib.import_module("fla.ops")
        importlib.import_module("fla.modules")
    except ImportError as error:
        print(f"flash-linear-attention is not there ({error}): not compared", flush=True)
        return None
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            for kernel in vars(module).values():
                _cut_down(kernel)
    return ops


def _cut_down(kernel: Any) -> None:
    """Leaves an autotuned kernel the shapes of `LAUNCHES`, or its first few where it is not in."""
    while hasattr(kernel, "fn") and not hasattr(kernel, "configs"):
        kernel = kernel.fn
    if not isinstance(getattr(kernel, "configs", None), list):
        return
    wanted = LAUNCHES.get(kernel.base_fn.__name__, [{}])
    chosen = [
        next((c for c in kernel.configs if w.items() <= _options(c).items()), None) for w in wanted
    ]
    kernel.configs = [c for c in chosen if c is not None] or kernel.configs[:1]


def _options(config: Any) -> dict[str, int]:
    return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def jet_block(config: dict[str, Any]) -> torch.nn.Module | None:
    """NVIDIA's JetBlock of a jet_nemotron config, bfloat16 on the GPU; None and a line otherwise.

    Its weights are filled at random, the generator's too, which the class leaves at zero.
    """
    folder = Path(os.environ.get(VARIABLE, ""))
    if not (folder / "jet_block.py").is_file():
        print(f"NVIDIA's Jet block is not there (no {VARIABLE}): not compared", flush=True)
        return None
    if flash_linear_attention() is None:
        return None
    jet = _jet_module(folder)
    options = dict(config["efficient_attention_config"]["jet"])
    block = jet.JetBlock(
        hidden_size=config["hidden_size"],
        initializer_range=0.02,
        layer_idx=0,
        jet_block_config=jet.JetBlockConfig(**options),
    )
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
            elif name.endswith("w2.bias"):
                weight.normal_(std=0.5)
    block = block.to("cuda", torch.bfloat16).eval().requires_grad_(requires_grad=False)
    for name in ("A_log", "dt_bias"):
        parameter = getattr(block, name)
        parameter.data = parameter.data.float()
    return block


class JetCache(list[dict[str, Any]]):
    """What their block asks of a cache: the state of one layer."""

    def update(self, **state: Any) -> None:
        """Keeps what the block hands back."""
        self[:] = [state]


def _jet_module(folder: Path) -> Any:
    """Their module, with two of its imports stood in for: the config and the cache of whole models,
    which do not load on transformers 5, and a keyword that released versions of fla do not have."""
    package = types.ModuleType("jet_peer")
    package.__path__ = [str(folder)]
    sys.modules["jet_peer"] = package
    for name, attribute in (
        ("configuration_jet_nemotron", "JetNemotronConfig"),
        ("kv_cache", "JetNemotronCache"),
    ):
        module: Any = types.ModuleType(f"jet_peer.{name}")
        setattr(module, attribute, object)
        sys.modules[module.__name__] = module
    jet = importlib.import_module("jet_peer.jet_block")
    for name in ("FusedRMSNormGated", "chunk_gated_delta_rule"):
        setattr(jet, name, _without_interval(getattr(jet, name)))
    return jet


def _without_interval(function: Any) -> Any:
    @functools.wraps(function, updated=())
    def call(*args: Any, autotune_interval: int = 0, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


def copies(block: torch.nn.Module, count: int) -> list[torch.nn.Module]:
    """With weights of their own."""
    return [copy.deepcopy(block) for _ in range(count)]


def their_state(state: LayerState, count: int) -> tuple[Tensor, Tensor]:
    """Their windows, oldest first with a column to spare in front, and their recurrent state."""
    assert state.recurrent is not None
    ring = state.rings["qkv"][1:]
    order = [(START - 4 + i) % 4 for i in range(4)]
    return ring[:, order].transpose(1, 2).contiguous(), state.recurrent[1:]


def their_step(block: torch.nn.Module, x: Tensor, conv: Tensor, recurrent: Tensor) -> Any:
    """One token of their block -> ((output, cache), cache)."""
    cache = JetCache([{"conv_state": conv, "recurrent_state": recurrent}])
    with torch.no_grad():
        return block(x[:, None], past_key_value=cache, use_cache=True), cache


def compare(block: Any, theirs: Any, x: Tensor, state: LayerState, batch: FlatBatch) -> None:
    """One step of both from one state."""
    assert state.recurrent is not None
    count, hidden = x.shape
    mine = replace(
        state, rings={"qkv": state.rings["qkv"].clone()}, recurrent=state.recurrent.clone()
    )
    conv, recurrent = their_state(state, count)
    (y, _), cache = their_step(theirs, x, conv, recurrent.clone())
    one = Norm(torch.ones(hidden, dtype=x.dtype, device=x.device), 1e-6)
    _, out = block(x, torch.zeros_like(x), one, x.new_zeros(count, 0), mine, batch)
    assert mine.recurrent is not None
    print(
        f"  difference from NVIDIA's, batch {count}: output {gap(out, y[:, 0]):.1e}, "
        f"state {gap(mine.recurrent[1:], cache[0]['recurrent_state']):.1e}, "
        f"window {gap(mine.rings['qkv'][1:, START % 4], cache[0]['conv_state'][..., -1]):.1e}",
        flush=True,
    )


def gap(a: Tensor, b: Tensor) -> float:
    """Relative distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())
