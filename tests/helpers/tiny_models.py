"""Small random checkpoints of every kind of convolution, and a decoder that knows no state.

`naive_logits` reads the stored tensors by their names and computes whole sequences in float64 with
loops and definitions alone: no cache, no batch, no fused weights, nothing of the engine's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_mixers import BUILT_IN, DELTA, HEADWISE, LOWRANK, MAMBA2, naive_mixer, rand_mixer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

BASE: dict[str, Any] = {
    "model_type": "dynconv",
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "qk_norm": "none",
}

CONV: dict[str, Any] = {
    "kind": "lowrank",
    "width": 4,
    "rank": 3,
    "head_size": None,
    "placement": ["q", "k", "v"],
    "residual": True,
    "bias": True,
    "activation": None,
    "generator_input": "linear_input",
    "qk_norm_order": "conv_first",
    "tap_order": "recent_first",
    "output_scale": 1.0,
    "layers": None,
}

ALL = ["q", "k", "v", "o", "gate", "up", "down"]


def _layers(kind: str, sizes: dict[str, Any], conv: dict[str, Any] | None) -> dict[str, Any]:
    """Model keys of a hybrid: the mixer, windowed attention, the mixer again."""
    return {
        "layer_types": [kind, "sliding_attention", kind],
        "sliding_window": 7,
        kind: sizes if conv is None else {**sizes, "conv": conv},
    }


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {"kind": "none"}),
    "lowrank qkv": ({}, {}),
    "lowrank width 2": ({}, {"width": 2}),
    "lowrank width 5": ({}, {"width": 5, "rank": 1}),
    "lowrank width 8": ({"num_hidden_layers": 2}, {"width": 8}),
    "lowrank k v": ({}, {"placement": ["k", "v"]}),
    "lowrank q": ({}, {"placement": ["q"]}),
    "lowrank all": ({}, {"placement": ALL}),
    "block norm": ({}, {"placement": ALL, "generator_input": "block_norm"}),
    "block norm o down": ({}, {"placement": ["o", "down"], "generator_input": "block_norm"}),
    "gate alone": ({}, {"placement": ["gate"]}),
    "no residual, no bias": ({}, {"placement": ALL, "residual": False, "bias": False}),
    "silu and scale": ({}, {"placement": ALL, "activation": "silu", "output_scale": 0.6}),
    "oldest first": ({}, {"tap_order": "oldest_first"}),
    "some layers": ({}, {"placement": ALL, "layers": [1]}),
    "headwise": ({}, {"kind": "headwise", "head_size": 4}),
    "headwise oldest first": (
        {"qk_norm": "head"},
        {"kind": "headwise", "head_size": 8, "tap_order": "oldest_first", "width": 3},
    ),
    "headwise all": ({}, {"kind": "headwise", "head_size": 8, "placement": ALL}),
    "static": ({}, {"kind": "static", "bias": False}),
    "static all": ({}, {"kind": "static", "placement": ALL, "activation": "silu"}),
    "norm first": ({"qk_norm": "head"}, {"qk_norm_order": "norm_first"}),
    "norm first, full": ({"qk_norm": "full"}, {"qk_norm_order": "norm_first", "placement": ALL}),
    "conv first, full": ({"qk_norm": "full"}, {}),
    "biases": ({"attention_bias": True, "mlp_bias": True}, {"placement": ALL}),
    "tied": ({"tie_word_embeddings": True}, {}),
    "delta": (_layers("gated_delta_net", DELTA, {**BUILT_IN, "placement": ["q", "k", "v"]}), {}),
    "delta without convolutions": (_layers("gated_delta_net", DELTA, None), {"kind": "none"}),
    "delta lowrank": (
        _layers("gated_delta_net", DELTA, {**LOWRANK, "placement": ["q", "v"]}),
        {"placement": ALL},
    ),
    "delta headwise": (
        _layers("gated_delta_net", DELTA, {**HEADWISE, "placement": ["v"]}),
        {"width": 2},
    ),
    "mamba2": (
        _layers("mamba2", MAMBA2, {**BUILT_IN, "bias": True, "placement": ["xbc"]}),
        {"kind": "none"},
    ),
    "mamba2 lowrank": (_layers("mamba2", MAMBA2, {**LOWRANK, "placement": ["xbc"]}), {}),
    "mamba2 headwise": (_layers("mamba2", MAMBA2, {**HEADWISE, "placement": ["xbc"]}), {}),
    "experts": (
        {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True},
        {"placement": ["q", "k", "v", "o"]},
    ),
}


def config_of(variant: str) -> dict[str, Any]:
    """The config.json of a variant."""
    model, conv = VARIANTS[variant]
    return {**BASE, **model, "conv": {**CONV, **conv}}


def write_model(folder: Path, config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Writes config and random weights; returns the weights."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}

    def rand(name: str, *shape: int, scale: float | None = None) -> None:
        size = shape[-1] ** -0.5 if scale is None else scale
        weights[name] = torch.randn(*shape, generator=generator) * size

    def norm(name: str, width: int) -> None:
        weights[name] = 1 + 0.2 * torch.randn(width, generator=generator)

    c, h = config, config["hidden_size"]
    width_of, input_of = _widths(c)
    rand("model.embed_tokens.weight", c["vocab_size"], h, scale=1.0)
    norm("model.norm.weight", h)
    if not c["tie_word_embeddings"]:
        rand("lm_head.weight", c["vocab_size"], h)
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        norm(f"{layer}.input_layernorm.weight", h)
        norm(f"{layer}.post_attention_layernorm.weight", h)
        kind = _mixer(c, i)
        if kind is not None:
            rand_mixer(rand, c, kind, f"{layer}.mixer")
        if c["qk_norm"] != "none" and kind is None:
            head = c["qk_norm"] == "head"
            for x in "qk":
                width = c["head_dim"] if head else width_of[x]
                norm(f"{layer}.self_attn.{x}_norm.weight", width)
        for place in ALL:
            prefix = _prefix(layer, place)
            if kind is not None and place in ("q", "k", "v", "o"):
                continue
            if c.get("num_experts") and place in ("gate", "up", "down"):
                for e in range(c["num_experts"]):
                    name = f"{prefix}.experts.{e}.{place}_proj.weight"
                    rand(name, width_of[place], input_of[place])
                continue
            rand(f"{prefix}.{place}_proj.weight", width_of[place], input_of[place])
            if c["attention_bias"] if place in ("q", "k", "v", "o") else c["mlp_bias"]:
                rand(f"{prefix}.{place}_proj.bias", width_of[place], scale=0.3)
            conv = c["conv"]
            layers = conv["layers"]
            if conv["kind"] == "none" or place not in conv["placement"]:
                continue
            if layers is not None and i not in layers:
                continue
            _rand_filter(rand, conv, prefix, place, width_of[place], _generator_width(c, place))
        if c.get("num_experts"):
            rand(f"{layer}.mlp.gate.weight", c["num_experts"], h)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


def _rand_filter(
    rand: Any, conv: dict[str, Any], prefix: str, place: str, width: int, source: int
) -> None:
    taps = conv["width"]
    if conv["kind"] == "static":
        rand(f"{prefix}.{place}_conv1d.weight", width, 1, taps, scale=0.5)
        if conv["bias"]:
            rand(f"{prefix}.{place}_conv1d.bias", width, scale=0.3)
        return
    module = f"{prefix}.dynamic_conv_{place}"
    if conv["kind"] == "lowrank":
        rand(f"{module}.proj_in.weight", conv["rank"], source)
        rand(f"{module}.proj_out", conv["rank"], taps * width, scale=0.5)
        bias = f"{module}.proj_out_bias"
    else:
        rand(f"{module}.weight_proj.weight", width // conv["head_size"] * taps, source)
        bias = f"{module}.static_w"
    if conv["bias"]:
        rand(bias, taps, width, scale=0.4)


def naive_logits(config: dict[str, Any], stored: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Logits [T, V] of a whole sequence, in float64."""
    w = {name: tensor.double() for name, tensor in stored.items()}
    c, eps = config, config["rms_norm_eps"]
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        g = _norm(x, w[f"{layer}.input_layernorm.weight"], eps)
        kind = _mixer(c, i)
        if kind is not None:
            x = x + naive_mixer(c, w, kind, f"{layer}.mixer", g)
        else:
            a = _attention(c, w, layer, i, g)
            x = x + _project(c, w, layer, i, "o", a, g)
        g = _norm(x, w[f"{layer}.post_attention_layernorm.weight"], eps)
        if c.get("num_experts"):
            x = x + _experts(c, w, layer, g)
        else:
            gate = _project(c, w, layer, i, "gate", g, g)
            up = _project(c, w, layer, i, "up", g, g)
            x = x + _project(c, w, layer, i, "down", F.silu(gate) * up, g)
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return _norm(x, w["model.norm.weight"], eps) @ head.T


def _attention(c: dict[str, Any], w: dict[str, Tensor], layer: str, i: int, g: Tensor) -> Tensor:
    norm_first = c["conv"].get("qk_norm_order") == "norm_first" and _has_conv(c, i)
    d, heads = c["head_dim"], {}
    for place in ("q", "k", "v"):
        y = _linear(w, layer, place, g)

        def normed(y: Tensor, place: str = place) -> Tensor:
            if place == "v" or c["qk_norm"] == "none":
                return y
            weight = w[f"{layer}.self_attn.{place}_norm.weight"]
            if c["qk_norm"] == "head":
                return _norm(y.unflatten(1, (-1, d)), weight, c["rms_norm_eps"]).flatten(1)
            return _norm(y, weight, c["rms_norm_eps"])

        if norm_first:
            y = normed(y)
        y = _convolve(c, w, layer, i, place, y, g)
        if not norm_first:
            y = normed(y)
        y = y.unflatten(1, (-1, d)).transpose(0, 1)  # [heads, T, d]
        heads[place] = y if place == "v" else _rope(y, c["rope_theta"])
    group = c["num_attention_heads"] // c["num_key_value_heads"]
    k, v = (heads[p].repeat_interleave(group, 0) for p in "kv")
    scores = heads["q"] @ k.transpose(1, 2) * d**-0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    if c.get("layer_types"):
        future |= torch.ones_like(future).tril(-c["sliding_window"])
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def _mixer(c: dict[str, Any], i: int) -> str | None:
    """The kind of a layer's mixer; None for attention."""
    kind = c["layer_types"][i] if "layer_types" in c else "full_attention"
    return None if kind.endswith("attention") else kind


def _rope(x: Tensor, theta: float) -> Tensor:
    half = x.shape[-1] // 2
    inverse = 1.0 / theta ** (torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), inverse)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def _experts(c: dict[str, Any], w: dict[str, Tensor], layer: str, g: Tensor) -> Tensor:
    probs = (g @ w[f"{layer}.mlp.gate.weight"].T).softmax(-1)
    out = torch.zeros_like(g)
    for t in range(len(g)):
        values, ids = probs[t].topk(c["num_experts_per_tok"])
        if c["norm_topk_prob"]:
            values = values / values.sum()
        for value, e in zip(values, ids.tolist(), strict=True):
            name = f"{layer}.mlp.experts.{e}"
            gate = w[f"{name}.gate_proj.weight"] @ g[t]
            up = w[f"{name}.up_proj.weight"] @ g[t]
            out[t] += value * (w[f"{name}.down_proj.weight"] @ (F.silu(gate) * up))
    return out


def _project(
    c: dict[str, Any],
    w: dict[str, Tensor],
    layer: str,
    i: int,
    place: str,
    x: Tensor,
    block_norm: Tensor,
) -> Tensor:
    source = block_norm if c["conv"].get("generator_input") == "block_norm" else x
    return _convolve(c, w, layer, i, place, _linear(w, layer, place, x), source)


def _convolve(
    c: dict[str, Any],
    w: dict[str, Tensor],
    layer: str,
    i: int,
    place: str,
    x: Tensor,
    source: Tensor,
) -> Tensor:
    conv = c["conv"]
    if not _has_conv(c, i) or place not in conv["placement"]:
        return x
    taps, (length, width) = conv["width"], x.shape
    prefix = _prefix(layer, place)
    module = f"{prefix}.dynamic_conv_{place}"
    if conv["kind"] == "static":
        f = w[f"{prefix}.{place}_conv1d.weight"][:, 0].T.flip(0).expand(length, -1, -1)
    elif conv["kind"] == "lowrank":
        code = source @ w[f"{module}.proj_in.weight"].T
        f = (code @ w[f"{module}.proj_out"]).view(length, taps, width)
    else:
        code = source @ w[f"{module}.weight_proj.weight"].T
        f = code.view(length, -1, taps).repeat_interleave(conv["head_size"], 1).transpose(1, 2)
    name = f"{module}.proj_out_bias" if conv["kind"] == "lowrank" else f"{module}.static_w"
    if conv["kind"] != "static" and conv["bias"]:
        f = f + w[name]
    if conv["kind"] != "static" and conv["tap_order"] == "oldest_first":
        f = f.flip(1)
    y = torch.zeros_like(x)
    for t in range(length):
        for tap in range(min(taps, t + 1)):
            y[t] += f[t, tap] * x[t - tap]
    if conv["kind"] == "static" and conv["bias"]:
        y = y + w[f"{prefix}.{place}_conv1d.bias"]
    if conv["residual"]:
        y = y + x
    y = y * conv["output_scale"]
    return F.silu(y) if conv["activation"] == "silu" else y


def _linear(w: dict[str, Tensor], layer: str, place: str, x: Tensor) -> Tensor:
    name = f"{_prefix(layer, place)}.{place}_proj"
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _has_conv(c: dict[str, Any], i: int) -> bool:
    conv = c["conv"]
    return conv["kind"] != "none" and (conv["layers"] is None or i in conv["layers"])


def _prefix(layer: str, place: str) -> str:
    return f"{layer}.self_attn" if place in ("q", "k", "v", "o") else f"{layer}.mlp"


def _widths(c: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    h, inner = c["hidden_size"], c["intermediate_size"]
    q = c["num_attention_heads"] * c["head_dim"]
    kv = c["num_key_value_heads"] * c["head_dim"]
    out = {"q": q, "k": kv, "v": kv, "o": h, "gate": inner, "up": inner, "down": h}
    source = {"q": h, "k": h, "v": h, "o": q, "gate": h, "up": h, "down": inner}
    return out, source


def _generator_width(c: dict[str, Any], place: str) -> int:
    if c["conv"]["generator_input"] == "block_norm":
        return c["hidden_size"]
    return _widths(c)[1][place]
