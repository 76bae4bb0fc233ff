"""The models that the engine serves, for autograd: plain torch, whole sequences, no carried state.

Module names are checkpoint names, so `state_dict` is a checkpoint; a site (sites.py) follows any of
seven projections. Dense models and mixtures of experts, filters added before QK norm, the linear
layer's own input as the generator's: the rest of the format is refused.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from convserve.engine.models import ModelConfig, ModelError
from convserve.engine.models.checkpoint import CheckpointReader
from convserve.engine.models.config import ExpertsConfig, parse_config
from convserve.engine.models.families import FAMILIES
from convserve.engine.models.mixers import Attention
from convserve.engine.models.rope import rope_table
from safetensors.torch import save_file
from sites import HeadwiseConv, Linear, LoRA, LowRankConv, StaticConv
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

Kind = Literal["none", "static", "headwise", "lowrank"]
KINDS: tuple[Kind, ...] = ("none", "static", "headwise", "lowrank")
PLACES = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION_PLACES = PLACES[:4]


class Norm(nn.Module):
    """RMS norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)


class Experts(nn.Module):
    """A mixture of SwiGLU experts, computed as one wide MLP whose unchosen parts count nothing.

    That wastes arithmetic on experts that are not chosen and needs no sorting: right for small
    models.
    """

    def __init__(self, config: ExpertsConfig, hidden: int) -> None:
        super().__init__()
        self.config = config
        self.gate = Linear(config.count, hidden)
        self.experts = nn.ModuleList(nn.Module() for _ in range(config.count))
        for expert in self.experts:
            for name in ("gate_proj", "up_proj"):
                expert.add_module(name, Linear(config.width, hidden))
            expert.add_module("down_proj", Linear(hidden, config.width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, T, hidden] to (output, how unevenly experts are used: 1 is evenly)."""
        c = self.config
        probability = self.gate(x).float().softmax(-1)
        weight, chosen = probability.topk(c.per_token)
        if c.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        share = torch.zeros_like(probability).scatter(-1, chosen, weight)
        gate, up, down = (self._all(name).to(x.dtype) for name in ("gate", "up", "down"))
        inner = F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1))
        inner = inner.unflatten(-1, (c.count, -1)) * share[..., None].to(x.dtype)
        used = (share > 0).float().mean((0, 1)) / c.per_token
        unevenness = c.count * (used * probability.mean((0, 1))).sum()
        return F.linear(inner.flatten(2), down.transpose(0, 1).flatten(1)), unevenness

    def _all(self, place: str) -> Tensor:
        return torch.stack([getattr(e, f"{place}_proj").weight for e in self.experts])


class Layer(nn.Module):
    """Attention and MLP around the residual stream, with a site after any of seven projections."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, self.config = config, config
        heads, inner, hidden = c.num_heads * c.head_dim, c.intermediate_size, c.hidden_size
        self.input_layernorm = Norm(hidden, c.eps)
        self.post_attention_layernorm = Norm(hidden, c.eps)
        self.self_attn = nn.Module()
        self.mlp = nn.Module() if c.experts is None else Experts(c.experts, hidden)
        self.shapes = {
            "q": (heads, hidden),
            "k": (c.kv_width, hidden),
            "v": (c.kv_width, hidden),
            "o": (hidden, heads),
        }
        if c.experts is None:
            self.shapes |= {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        for place, (outputs, inputs) in self.shapes.items():
            bias = c.attention_bias if place in ATTENTION_PLACES else c.mlp_bias
            self._block(place).add_module(f"{place}_proj", Linear(outputs, inputs, bias))
        if c.qk_norm != "none":
            for x, width in (("q", heads), ("k", c.kv_width)):
                width = c.head_dim if c.qk_norm == "head" else width
                self.self_attn.add_module(f"{x}_norm", Norm(width, c.eps))

    def add_sites(self, kind: Kind, placement: list[str], width: int, size: int) -> None:
        """Adds sites of one kind; `size` is the rank, or channels that share a filter."""
        for place in placement:
            outputs, inputs = self.shapes[place]
            name, site = f"dynamic_conv_{place}", None
            if kind == "static":
                name, site = f"{place}_conv1d", StaticConv(outputs, width)
            elif kind == "lowrank":
                site = LowRankConv(outputs, inputs, width, size)
            elif kind == "headwise":
                site = HeadwiseConv(outputs, inputs, width, size)
            if site is not None:
                self._block(place).add_module(name, site)

    def add_lora(self, placement: list[str], rank: int) -> None:
        """Adds a weight update of this rank to projections, before their convolutions."""
        for place in placement:
            outputs, inputs = self.shapes[place]
            self._block(place).add_module(f"lora_{place}", LoRA(outputs, inputs, rank))

    def forward(self, x: Tensor, rope: Tensor, sites: bool = True) -> tuple[Tensor, Tensor | None]:
        """x [B, T, hidden] to (x, unevenness of the experts if there are any)."""
        c = self.config
        g = self.input_layernorm(x)
        q, k, v = (self._project(place, g, sites) for place in "qkv")
        if c.qk_norm == "full":
            q, k = self._norm("q", q), self._norm("k", k)
        q, k, v = (y.unflatten(-1, (-1, c.head_dim)) for y in (q, k, v))
        if c.qk_norm == "head":
            q, k = self._norm("q", q), self._norm("k", k)
        q, k, v = (y.transpose(1, 2) for y in (rotate(q, rope), rotate(k, rope), v))
        a = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=c.num_heads != c.num_kv_heads
        )
        x = x + self._project("o", a.transpose(1, 2).flatten(2), sites)
        g = self.post_attention_layernorm(x)
        if isinstance(self.mlp, Experts):
            y, unevenness = self.mlp(g)
            return x + y, unevenness
        inner = F.silu(self._project("gate", g, sites)) * self._project("up", g, sites)
        return x + self._project("down", inner, sites), None

    def _project(self, place: str, g: Tensor, sites: bool) -> Tensor:
        block = self._block(place)
        y = getattr(block, f"{place}_proj")(g)
        if sites:
            for name in (f"lora_{place}", f"dynamic_conv_{place}", f"{place}_conv1d"):
                if hasattr(block, name):
                    y = getattr(block, name)(y, g)
        return y

    def _norm(self, place: str, x: Tensor) -> Tensor:
        return getattr(self.self_attn, f"{place}_norm")(x)

    def _block(self, place: str) -> nn.Module:
        return self.self_attn if place in ATTENTION_PLACES else self.mlp


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, heads, head_dim] by rope [T, 2 * pairs] (cos, then sin)."""
    cos, sin = rope[: x.shape[1], None].chunk(2, dim=-1)
    first, second, rest = x.float().split(
        [cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1
    )
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)


class Body(nn.Module):
    """Embeddings, layers and the last norm: what checkpoints call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.eps)


class ConvModel(nn.Module):
    """A decoder with sites. `raw` is its config.json, which `save` writes again."""

    def __init__(self, raw: dict[str, Any]) -> None:
        """Random weights; sites as the config's `conv` says.

        Raises:
            ModelError: a model of this format that the recipes cannot train.
        """
        super().__init__()
        self.raw, self.config = raw, parse_config(raw)
        _refuse(self.config)
        self.model = Body(self.config)
        tied = self.config.tied_embeddings
        self.lm_head = None if tied else Linear(self.config.vocab_size, self.config.hidden_size)
        rope = rope_table(self.config.rope, self.config.max_positions, torch.device("cpu"))
        self.register_buffer("rope", rope, persistent=False)
        self.kind: Kind = "none"
        self.unevenness: Tensor | None = None
        """Of the experts in the last forward pass, mean of layers; 1 is all alike."""
        if (conv := self.config.conv) is not None:
            size = conv.rank if conv.kind == "lowrank" else conv.head_size
            self.add_sites(conv.kind, list(conv.placement), conv.width, size)

    def add_sites(self, kind: Kind, placement: list[str], width: int, size: int) -> None:
        """Adds convolutions to every layer, starting as the identity."""
        if self.kind != "none":
            raise ModelError(f"this model has {self.kind} sites already")
        if self.config.experts is not None and not set(placement) <= set(ATTENTION_PLACES):
            raise ModelError("gate, up and down have no sequence inside experts")
        self.kind = kind
        if kind == "none":
            return
        for layer in self.model.layers:
            layer.add_sites(kind, placement, width, size)  # pyright: ignore[reportCallIssue]
        conv: dict[str, Any] = {"kind": kind, "width": width, "placement": placement}
        if kind != "static":
            conv["rank" if kind == "lowrank" else "head_size"] = size
        qk_norm = self.config.qk_norm
        self.raw = {**self.raw, "model_type": "dynconv", "qk_norm": qk_norm, "conv": conv}
        self.raw["architectures"] = ["DynConvForCausalLM"]

    def add_lora(self, placement: list[str], rank: int) -> None:
        """Adds weight updates of this rank to every layer, starting at zero."""
        for layer in self.model.layers:
            layer.add_lora(placement, rank)  # pyright: ignore[reportCallIssue]

    def site_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters of the sites, by checkpoint name."""
        marks = ("dynamic_conv_", "_conv1d.", "lora_")
        return {n: p for n, p in self.named_parameters() if any(mark in n for mark in marks)}

    def forward(
        self, tokens: Tensor, dtype: torch.dtype = torch.bfloat16, sites: bool = True
    ) -> Tensor:
        """Token ids [B, T] to the last norm's output [B, T, hidden] in `dtype`."""
        x = self.model.embed_tokens(tokens).to(dtype)
        if torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # so that a frozen base compiles to one graph for every layer
        uneven: list[Tensor] = []
        for layer in self.model.layers:
            x, unevenness = layer(x, self.rope, sites)
            uneven += [] if unevenness is None else [unevenness]
        self.unevenness = torch.stack(uneven).mean() if uneven else None
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab], in the dtype of `hidden`."""
        head = self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return F.linear(hidden, head.to(hidden.dtype))

    @torch.no_grad()
    def merge_lora(self) -> None:
        """Adds the update of each LoRA to its projection and removes the LoRA."""
        for path, site in list(self.named_modules()):
            if isinstance(site, LoRA):
                block, _, name = path.rpartition(".")
                projection = self.get_submodule(f"{block}.{name.removeprefix('lora_')}_proj")
                assert isinstance(projection, Linear)
                weight = projection.weight
                update = site.up.weight.float() @ site.down.weight.float()
                weight.copy_((weight.float() + update).to(weight.dtype))
                delattr(self.get_submodule(block), name)


def load(folder: Path) -> ConvModel:
    """A model folder as a trainable model: float32 parameters on the CPU.

    Raises:
        ModelError: a folder that the engine would refuse, or that the recipes cannot train.
    """
    try:
        raw = json.loads((folder / "config.json").read_text())
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror}") from None
    model = ConvModel(raw)
    with CheckpointReader(folder, torch.float32, torch.device("cpu")) as reader:
        if model.lm_head is None and "lm_head.weight" in reader:
            reader.skip("lm_head.weight")
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        model.load_state_dict({name: reader.take(name, shape) for name, shape in shapes.items()})
        reader.finish()
    return model


def save(model: ConvModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes config.json and model.safetensors; a LoRA must be merged before."""
    folder.mkdir(parents=True, exist_ok=True)
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**model.raw, "dtype": name}, indent=1))
    tensors = {n: t.detach().to("cpu", dtype).contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read


def _refuse(c: ModelConfig) -> None:
    conv = c.conv
    if c.model_type in FAMILIES:
        raise ModelError(f"the recipes train Llama-shaped models only, not {c.model_type}")
    if any(mixer != Attention() for mixer in c.mixers):
        raise ModelError("the recipes train models of full attention in every layer only")
    if c.experts is not None and c.experts.shared_width:
        raise ModelError("the recipes train experts without a shared one only")
    if conv is None:
        return
    usual = (True, True, None, "linear_input", "conv_first", "recent_first", 1.0, None)
    fields = "residual bias activation generator_input qk_norm_order tap_order output_scale layers"
    for field, value in zip(fields.split(), usual, strict=True):
        if getattr(conv, field) != value:
            raise ModelError(f"the recipes train conv.{field} {value!r} only")
