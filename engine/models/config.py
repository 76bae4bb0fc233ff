"""config.json -> ModelConfig: what a checkpoint is, checked key by key, in one spelling.

Reads both the keys of transformers 5 (`rope_parameters`, `dtype`, `num_local_experts`) and the
older ones. What it cannot serve it refuses by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .conv_config import ConvConfig, parse_conv
from .errors import ModelError
from .families import FAMILIES, Family
from .mixers import Attention, GatedDelta, Mamba2, Mixer, parse_gated_delta, parse_mamba2
from .mixers import positive as _int
from .rope import RopeConfig, parse_rope

if TYPE_CHECKING:
    from pathlib import Path

    from .names import TensorNames

MODEL_TYPES = ("dynconv", "llama", "olmoe", "qwen3", "qwen3_moe", *FAMILIES)


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of SwiGLU experts in place of the MLP."""

    count: int
    per_token: int
    width: int
    normalize: bool
    """Divide the chosen experts' probabilities by their sum."""
    shared_width: int = 0
    """Width of the expert that every token goes through, behind a gate; 0 for none."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of pre-norm layers: a mixer (attention or a recurrence) and an MLP."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    eps: float
    max_positions: int
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: Literal["none", "head", "full"]
    rope: RopeConfig
    experts: ExpertsConfig | None
    conv: ConvConfig | None
    mixers: tuple[Mixer, ...]
    """One per layer."""
    dtype: str
    """The dtype the checkpoint says it is meant for."""
    eos_token_ids: tuple[int, ...]
    names: TensorNames
    has_mlp: bool
    o_bias: bool
    attention_gate: bool
    """q has a gate beside each head: attention's output is multiplied by its sigmoid."""
    norm_offset: float
    """Added to stored RMSNorm weights."""
    interleaved_rope: bool
    """The checkpoint rotates neighbouring channels, not halves."""

    @property
    def q_width(self) -> int:
        """Channels of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of the key (or value) projection."""
        return self.num_kv_heads * self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many positions attention sees; None for all, or without attention."""
        return tuple(m.window if isinstance(m, Attention) else None for m in self.mixers)

    @property
    def has_attention(self) -> bool:
        """A layer has attention."""
        return any(isinstance(m, Attention) for m in self.mixers)

    @property
    def has_recurrence(self) -> bool:
        """A layer's state moves on with every token and cannot be rebuilt from the last few."""
        return any(isinstance(m, (GatedDelta, Mamba2)) for m in self.mixers)

    def conv_of(self, layer: int) -> ConvConfig | None:
        """The convolutions of one layer's attention and MLP, if it has any."""
        if self.conv is None or (self.conv.layers is not None and layer not in self.conv.layers):
            return None
        return self.conv


def read_config(folder: Path) -> ModelConfig:
    """Reads and checks `config.json` (and eos ids of `generation_config.json`).

    Raises:
        ModelError: no such file, not JSON, or a key that is missing, wrong or unsupported.
    """
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise ModelError(f"{folder}: not a model folder (no config.json)")
    generation = _read_json(folder / "generation_config.json") or {}
    try:
        return parse_config(raw, generation)
    except ModelError as error:
        raise ModelError(f"{folder / 'config.json'}: {error}") from None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return value


def parse_config(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """A ModelConfig from the parsed files; see `read_config`."""
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ModelError(
            f"model_type {model_type!r} is not supported (supported: {', '.join(MODEL_TYPES)})"
        )
    family = FAMILIES[model_type](raw) if model_type in FAMILIES else _llama_like(raw, model_type)
    raw = family.raw
    _refuse_unsupported(raw)
    layers = _int(raw, "num_hidden_layers")
    hidden = _int(raw, "hidden_size")
    heads = _int(raw, "num_attention_heads")
    kv_heads = _int(raw, "num_key_value_heads", heads)
    head_dim = _int(raw, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise ModelError(f"num_key_value_heads {kv_heads} does not divide {heads} attention heads")
    max_positions = _int(raw, "max_position_embeddings")
    experts = _experts(raw, model_type)
    conv = family.conv
    if conv and experts and {"gate", "up", "down"} & set(conv.placement):
        raise ModelError("conv.placement: gate, up and down have no sequence inside experts")
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        model_type=model_type,
        vocab_size=_int(raw, "vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_int(raw, "intermediate_size"),
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_positions=max_positions,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=attention_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        rope=parse_rope(raw, head_dim, max_positions),
        experts=experts,
        conv=conv,
        mixers=family.mixers,
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_token_ids=_eos(raw, generation or {}),
        names=family.names,
        has_mlp=family.has_mlp,
        o_bias=attention_bias if family.bias_o is None else family.bias_o,
        attention_gate=family.attention_gate,
        norm_offset=family.norm_offset,
        interleaved_rope=family.interleaved_rope,
    )


def _llama_like(raw: dict[str, Any], model_type: str) -> Family:
    layers = _int(raw, "num_hidden_layers")
    is_dynconv = model_type == "dynconv"
    conv = parse_conv(raw["conv"], layers) if raw.get("conv") and is_dynconv else None
    mixers = _mixers(raw, layers, is_dynconv)
    return Family(raw, mixers, qk_norm=_qk_norm(raw, model_type), conv=conv)


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise ModelError(f"hidden_act {act!r} is not supported (supported: silu)")
    for key in ("clip_qkv", "quantization_config", "logit_scale", "final_logit_softcapping"):
        if raw.get(key) is not None:
            raise ModelError(f"{key} is not supported")
    if raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1:
        raise ModelError("mlp_only_layers / decoder_sparse_step: mixed layers are not supported")


def _experts(raw: dict[str, Any], model_type: str) -> ExpertsConfig | None:
    count = raw.get("num_experts") or raw.get("num_local_experts") or 0
    if not count or model_type not in ("dynconv", "olmoe", "qwen3_moe", "qwen3_next"):
        return None
    width = raw.get("moe_intermediate_size") or _int(raw, "intermediate_size")
    per_token = _int(raw, "num_experts_per_tok")
    if not 1 <= per_token <= count:
        raise ModelError(f"num_experts_per_tok {per_token} must be in 1..num_experts ({count})")
    shared = raw.get("shared_expert_intermediate_size") or 0
    normalize = bool(raw.get("norm_topk_prob", model_type == "qwen3_next"))
    return ExpertsConfig(count, per_token, width, normalize, shared)


def _qk_norm(raw: dict[str, Any], model_type: str) -> Literal["none", "head", "full"]:
    by_type: dict[str, Literal["none", "head", "full"]]
    by_type = {"llama": "none", "qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}
    value = raw.get("qk_norm", "none") if model_type == "dynconv" else by_type[model_type]
    if value not in ("none", "head", "full"):
        raise ModelError(f"qk_norm {value!r} must be none, head or full")
    return value


def _mixers(raw: dict[str, Any], layers: int, is_dynconv: bool) -> tuple[Mixer, ...]:
    window = raw.get("sliding_window")
    types = raw.get("layer_types") or ["full_attention"] * layers
    if len(types) != layers:
        raise ModelError(f"layer_types has {len(types)} entries for {layers} layers")
    kinds: dict[str, Mixer] = {"full_attention": Attention()}
    if "sliding_attention" in types:
        if not isinstance(window, int):
            raise ModelError("layer_types has sliding_attention but sliding_window is not set")
        kinds["sliding_attention"] = Attention(window)
    if is_dynconv and "gated_delta_net" in types:
        kinds["gated_delta_net"] = parse_gated_delta(raw.get("gated_delta_net"))
    if is_dynconv and "mamba2" in types:
        kinds["mamba2"] = parse_mamba2(raw.get("mamba2"))
    unknown = sorted({str(t) for t in types} - kinds.keys())
    if unknown:
        raise ModelError(f"layer_types: {unknown} not supported")
    return tuple(kinds[t] for t in types)


def _eos(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)
