"""Linear recurrences with carried state: the gated delta rule and Mamba-2's SSD, in plain torch.

Both are one recurrence over a matrix S [K, V] per head, from key k, value v, query q and log-decay
g <= 0 of each token:

    S <- exp(g) S
    u = beta (v - S^T k) for the delta rule, v for SSD
    S <- S + k u^T
    o = S^T q

State lies in `state[slot]` and stands after the sequence's last computed token; a sequence that
starts at position 0 reads zero, whatever the slot holds. One-token rows are taken together; longer
runs go chunk by chunk, in the form where a chunk's u come from one triangular system.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .batch import FlatBatch
    from .recurrent import DeltaParts, SSDParts

CHUNK = 64
"""Rows that share one triangular system."""


def delta_rule(
    parts: DeltaParts,
    qkv: Tensor,
    gate: Tensor,
    b: Tensor,
    a: Tensor,
    state: Tensor,
    batch: FlatBatch,
) -> Tensor:
    """See `Ops.delta_rule`."""
    p = parts
    wide = state.dtype
    q, k, v = (
        F.silu(x.to(wide)) if silu else x.to(wide)
        for x, silu in zip(qkv.split(p.widths, dim=1), p.silu, strict=True)
    )
    group = p.value_heads // p.key_heads
    q = l2_norm(q.unflatten(1, (p.key_heads, p.key_dim))).repeat_interleave(group, dim=1)
    k = l2_norm(k.unflatten(1, (p.key_heads, p.key_dim))).repeat_interleave(group, dim=1)
    v = v.unflatten(1, (p.value_heads, p.value_dim))
    decay = p.rate * F.softplus(a.to(wide) + p.dt_bias)
    o = recur(q * p.key_dim**-0.5, k, v, decay, b.to(wide).sigmoid(), state, batch)
    gates = gate.unflatten(1, (p.value_heads, p.value_dim))
    return gated_rms_norm(o, gates, p.norm, p.eps, gate_first=False).flatten(1).to(qkv.dtype)


def ssd(
    parts: SSDParts, xbc: Tensor, gate: Tensor, dt: Tensor, state: Tensor, batch: FlatBatch
) -> Tensor:
    """See `Ops.ssd`."""
    p = parts
    wide = state.dtype
    x, b, c = (part.to(wide) for part in xbc.split(p.widths, dim=1))
    x = x.unflatten(1, (p.heads, p.head_dim))
    b, c = (
        part.unflatten(1, (p.groups, p.state_dim)).repeat_interleave(p.heads // p.groups, dim=1)
        for part in (b, c)
    )
    step = F.softplus(dt.to(wide) + p.dt_bias)
    y = recur(c, b, x * step[..., None], p.rate * step, None, state, batch)
    y = (y + x * p.skip[:, None]).flatten(1).unflatten(1, (p.groups, -1))
    gates, norm = gate.unflatten(1, (p.groups, -1)), p.norm.unflatten(0, (p.groups, -1))
    return gated_rms_norm(y, gates, norm, p.eps, gate_first=True).flatten(1).to(xbc.dtype)


def l2_norm(x: Tensor) -> Tensor:
    """x / sqrt(sum x^2 + 1e-6) over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, gate_first: bool
) -> Tensor:
    """RMSNorm(x * silu(gate)) if `gate_first`, else RMSNorm(x) * silu(gate); over the last axis."""
    gates = F.silu(gate.to(x.dtype))
    if gate_first:
        x = x * gates
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
    return y if gate_first else y * gates


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor | None,
    state: Tensor,
    batch: FlatBatch,
) -> Tensor:
    """The recurrence over a flat batch; `state` is left after each sequence's last row.

    Args:
        q, k: [T, H, K]. v: [T, H, V]. decay: [T, H], the log of what a step leaves of the state.
        beta: [T, H] for the delta rule; None for SSD.
        state: [slots, H, K, V], in the dtype of the rest.

    Returns:
        o [T, H, V]; zero in padding rows.
    """
    assert batch.spans is not None, "the reference needs the host copy of the batch's spans"
    out = torch.zeros_like(v)
    singles: list[tuple[int, int]] = []
    offset = 0
    for s, (start, rows) in enumerate(batch.spans):
        if rows == 1:
            singles.append((s, offset))
        elif rows > 1:
            part = slice(offset, offset + rows)
            slot = int(batch.slots[s])
            before = state[slot] if start else torch.zeros_like(state[slot])
            out[part], state[slot] = _run(
                q[part], k[part], v[part], decay[part], None if beta is None else beta[part], before
            )
        offset += rows
    if singles:
        seqs, rows = torch.tensor(singles, device=q.device).unbind(1)
        slots = batch.slots.long()[seqs]
        carried = state[slots]
        if any(not batch.spans[s][0] for s, _ in singles):
            # Select, never multiply: the slot may hold anything (NaN in tests).
            carried[batch.starts[seqs] == 0] = 0
        out[rows] = _step(
            q[rows], k[rows], v[rows], decay[rows], None if beta is None else beta[rows], carried
        )
        state[slots] = carried
    return out


def _step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> Tensor:
    """One token of every sequence, changing state [S, H, K, V]. q, k [S, H, K], v [S, H, V]."""
    state *= decay.exp()[..., None, None]
    if beta is not None:
        v = (v - (k[..., None, :] @ state).squeeze(-2)) * beta[..., None]
    state.addcmul_(k[..., None], v[..., None, :])
    return (q[..., None, :] @ state).squeeze(-2)


def _run(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, before: Tensor
) -> tuple[Tensor, Tensor]:
    """Consecutive tokens of one sequence. q, k [n, H, K], v [n, H, V], before [H, K, V]."""
    parts: list[Tensor] = []
    for start in range(0, len(q), CHUNK):
        rows = slice(start, start + CHUNK)
        o, before = _chunk(
            q[rows].transpose(0, 1),
            k[rows].transpose(0, 1),
            v[rows].transpose(0, 1),
            decay[rows].T,
            None if beta is None else beta[rows].T,
            before,
        )
        parts.append(o.transpose(0, 1))
    return torch.cat(parts), before


def _chunk(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None, before: Tensor
) -> tuple[Tensor, Tensor]:
    """All rows of a chunk at once. q, k [H, n, K], v [H, n, V], decay [H, n]."""
    total = decay.cumsum(1)
    # What token j leaves at token i >= j. Masked before exp: above the diagonal it would overflow.
    gap = total[:, :, None] - total[:, None, :]
    lower = torch.ones_like(gap[0], dtype=torch.bool).tril()
    left = gap.masked_fill(~lower, -torch.inf).exp()
    since = total.exp()[..., None]
    u = v
    if beta is not None:
        system = (left * (k @ k.transpose(1, 2))).tril(-1) * beta[..., None]
        rest = (v - since * (k @ before)) * beta[..., None]
        u = torch.linalg.solve_triangular(system, rest, upper=False, unitriangular=True, left=True)
    o = since * (q @ before) + (left * (q @ k.transpose(1, 2))) @ u
    last = (total[:, -1:] - total).exp()[..., None]
    return o, since[:, -1:] * before + (k * last).transpose(1, 2) @ u
