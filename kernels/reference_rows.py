"""What ops do to each row by itself: RMSNorm, RoPE, mixing experts. Plain torch.

Knows nothing of batches and of carried state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from .weights import QKNorm


def widen(x: Tensor) -> Tensor:
    """x in the dtype that ops compute in: float32, or float64 for float64 inputs."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in the wider of float32 and x's dtype, rounded once."""
    wide = widen(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * weight).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Ops.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=1)
    return (F.silu(widen(gate)) * up).to(gate_up.dtype)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotates x [T, heads, d] by rope [T, rot] (cos then sin), pairing channel i with i + rot/2."""
    half = rope.shape[1] // 2
    cos, sin = rope[:, None, :half], rope[:, None, half:]
    first, second = x[..., :half], x[..., half : 2 * half]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(r.to(x.dtype) for r in rotated), x[..., 2 * half :]), dim=-1)


def norm_qk(
    qkv: Tensor,
    norm: QKNorm,
    kv_width: int,
    head_dim: int,
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """q and k of [T, q width + 2 kv_width] through `rms_norm`, v as it is."""
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_width, kv_width, kv_width), dim=1)
    if norm.mode == "head":
        q = rms_norm(q.unflatten(1, (-1, head_dim)), norm.q, norm.eps).flatten(1)
        k = rms_norm(k.unflatten(1, (-1, head_dim)), norm.k, norm.eps).flatten(1)
    else:
        q, k = rms_norm(q, norm.q, norm.eps), rms_norm(k, norm.k, norm.eps)
    return torch.cat((q, k, v), dim=1)


def moe(
    x: Tensor,
    router_logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    top_k: int,
    normalize: bool,
) -> Tensor:
    """See `Ops.moe`."""
    weights, experts = widen(router_logits).softmax(-1).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(widen(x))
    for expert in experts.unique().tolist():
        row, choice = (experts == expert).nonzero(as_tuple=True)
        y = F.linear(silu_mul(F.linear(x[row], gate_up[expert])), down[expert])
        out.index_add_(0, row, y * weights[row, choice, None])
    return out.to(x.dtype)
