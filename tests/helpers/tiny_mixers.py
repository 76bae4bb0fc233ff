"""Random tensors and plain definitions of the mixers that may stand where attention does.

As `tiny_models`: stored names, whole sequences in float64, loops over tokens; nothing of the
engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

DELTA: dict[str, Any] = {
    "num_key_heads": 2,
    "num_value_heads": 4,
    "key_head_dim": 6,
    "value_head_dim": 8,
    "norm_eps": 1e-5,
}
MAMBA2: dict[str, Any] = {"num_heads": 6, "head_dim": 8, "num_groups": 2, "state_size": 5}
BUILT_IN: dict[str, Any] = {"kind": "static", "width": 4, "residual": False, "bias": False}
LOWRANK: dict[str, Any] = {"kind": "lowrank", "width": 3, "rank": 2}
HEADWISE: dict[str, Any] = {"kind": "headwise", "width": 4, "head_size": 2}


def rand_mixer(rand: Any, c: dict[str, Any], kind: str, prefix: str) -> None:
    """Writes the tensors of a `gated_delta_net` or `mamba2` mixer."""
    m, h = c[kind], c["hidden_size"]
    if kind == "gated_delta_net":
        widths = _delta_widths(m)
        value = widths["v"]
        for name, width in {**widths, "g": value, "b": 0, "a": 0}.items():
            rand(f"{prefix}.{name}_proj.weight", width or m["num_value_heads"], h)
        rand(f"{prefix}.o_norm.weight", m["value_head_dim"], scale=1.0)
        rand(f"{prefix}.o_proj.weight", h, value)
        heads = m["num_value_heads"]
    else:
        widths = {"xbc": _inner(m) + 2 * m["num_groups"] * m["state_size"]}
        heads = m["num_heads"]
        rand(f"{prefix}.in_proj.weight", _inner(m) + widths["xbc"] + heads, h)
        rand(f"{prefix}.norm.weight", _inner(m), scale=1.0)
        rand(f"{prefix}.out_proj.weight", h, _inner(m))
        rand(f"{prefix}.D", heads, scale=1.0)
    rand(f"{prefix}.A_log", heads, scale=0.5)
    rand(f"{prefix}.dt_bias", heads, scale=0.5)
    conv = m.get("conv")
    for place in conv["placement"] if conv else ():
        width, taps = widths[place], conv["width"]
        module = f"{prefix}.dynamic_conv_{place}"
        if conv["kind"] == "static":
            rand(f"{prefix}.{place}_conv1d.weight", width, 1, taps, scale=0.5)
            if conv.get("bias", True):
                rand(f"{prefix}.{place}_conv1d.bias", width, scale=0.3)
        elif conv["kind"] == "lowrank":
            rand(f"{module}.proj_in.weight", conv["rank"], h)
            rand(f"{module}.proj_out", conv["rank"], taps * width, scale=0.5)
            rand(f"{module}.proj_out_bias", taps, width, scale=0.4)
        else:
            rand(f"{module}.weight_proj.weight", width // conv["head_size"] * taps, h)
            rand(f"{module}.static_w", taps, width, scale=0.4)


def naive_mixer(
    c: dict[str, Any], w: dict[str, Tensor], kind: str, prefix: str, g: Tensor
) -> Tensor:
    """The mixer's output for a whole sequence of normed inputs g [T, hidden]."""
    return (_delta if kind == "gated_delta_net" else _mamba2)(c[kind], w, prefix, g)


def _delta(m: dict[str, Any], w: dict[str, Tensor], prefix: str, g: Tensor) -> Tensor:
    def project(name: str) -> Tensor:
        return g @ w[f"{prefix}.{name}_proj.weight"].T

    heads, group = m["num_value_heads"], m["num_value_heads"] // m["num_key_heads"]
    q, k, v = (_convolve(m.get("conv"), w, prefix, p, project(p), g) for p in "qkv")
    q, k = (x.view(len(g), m["num_key_heads"], -1).repeat_interleave(group, 1) for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    v = v.view(len(g), heads, -1)
    beta = project("b").sigmoid()
    soft = F.softplus(project("a") + w[f"{prefix}.dt_bias"])
    decay = (-w[f"{prefix}.A_log"].exp() * soft).exp()
    out = torch.zeros_like(v)
    for h in range(heads):
        state = torch.zeros(m["key_head_dim"], m["value_head_dim"], dtype=g.dtype)
        for t in range(len(g)):
            state = state * decay[t, h]
            seen = state.T @ k[t, h]
            state = state + torch.outer(k[t, h], beta[t, h] * (v[t, h] - seen))
            out[t, h] = state.T @ q[t, h] * m["key_head_dim"] ** -0.5
    out = _rms(out, m["norm_eps"]) * w[f"{prefix}.o_norm.weight"]
    out = out.flatten(1) * F.silu(project("g"))
    return out @ w[f"{prefix}.o_proj.weight"].T


def _mamba2(m: dict[str, Any], w: dict[str, Tensor], prefix: str, g: Tensor) -> Tensor:
    heads, groups, n = m["num_heads"], m["num_groups"], m["state_size"]
    inner = _inner(m)
    gate, xbc, dt = (g @ w[f"{prefix}.in_proj.weight"].T).split(
        (inner, inner + 2 * groups * n, heads), 1
    )
    xbc = _convolve(m["conv"], w, prefix, "xbc", xbc, g)
    x, b, c = xbc.split((inner, groups * n, groups * n), 1)
    step = F.softplus(dt + w[f"{prefix}.dt_bias"])
    decay = (-w[f"{prefix}.A_log"].exp() * step).exp()
    x = x.view(len(g), heads, -1)
    y = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h // (heads // groups) * n, (h // (heads // groups) + 1) * n)
        state = torch.zeros(n, m["head_dim"], dtype=g.dtype)
        for t in range(len(g)):
            state = state * decay[t, h] + torch.outer(b[t, part], x[t, h]) * step[t, h]
            y[t, h] = state.T @ c[t, part] + w[f"{prefix}.D"][h] * x[t, h]
    y = _rms((y.flatten(1) * F.silu(gate)).view(len(g), groups, -1), 1e-5).flatten(1)
    return (y * w[f"{prefix}.norm.weight"]) @ w[f"{prefix}.out_proj.weight"].T


def _convolve(
    conv: dict[str, Any] | None,
    w: dict[str, Tensor],
    prefix: str,
    place: str,
    x: Tensor,
    g: Tensor,
) -> Tensor:
    """SiLU of the convolution of x [T, D], or of x itself where there is none."""
    if conv is None or place not in conv["placement"]:
        return F.silu(x)
    taps, length = conv["width"], len(x)
    module = f"{prefix}.dynamic_conv_{place}"
    if conv["kind"] == "static":
        f = w[f"{prefix}.{place}_conv1d.weight"][:, 0].T.flip(0).expand(length, -1, -1)
    elif conv["kind"] == "lowrank":
        f = (g @ w[f"{module}.proj_in.weight"].T @ w[f"{module}.proj_out"]).view(length, taps, -1)
        f = f + w[f"{module}.proj_out_bias"]
    else:
        f = (g @ w[f"{module}.weight_proj.weight"].T).view(length, -1, taps)
        f = f.repeat_interleave(conv["head_size"], 1).transpose(1, 2) + w[f"{module}.static_w"]
    y = torch.zeros_like(x)
    for t in range(length):
        for tap in range(min(taps, t + 1)):
            y[t] += f[t, tap] * x[t - tap]
    if conv["kind"] == "static" and conv.get("bias", True):
        y = y + w[f"{prefix}.{place}_conv1d.bias"]
    return F.silu(y + x if conv.get("residual", True) else y)


def _delta_widths(m: dict[str, Any]) -> dict[str, int]:
    key = m["num_key_heads"] * m["key_head_dim"]
    return {"q": key, "k": key, "v": m["num_value_heads"] * m["value_head_dim"]}


def _inner(m: dict[str, Any]) -> int:
    return m["num_heads"] * m["head_dim"]


def _rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
