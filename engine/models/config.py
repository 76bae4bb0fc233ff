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
from .rope import RopeConfig, parse_rope

if TYPE_CHECKING:
    from pathlib import Path

MODEL_TYPES = ("dynconv", "llama", "olmoe", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of SwiGLU experts in place of the MLP."""

    count: int
    per_token: int
    width: int
    normalize: bool
    """Divide the chosen experts' probabilities by their sum."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of pre-norm attention and MLP blocks, with optional convolutions."""

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
    windows: tuple[int | None, ...]
    """Per layer, how many positions attention sees; None for all."""
    dtype: str
    """The dtype the checkpoint says it is meant for."""
    eos_token_ids: tuple[int, ...]

    @property
    def q_width(self) -> int:
        """Channels of the query projection."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of the key (or value) projection."""
        return self.num_kv_heads * self.head_dim

    def conv_of(self, layer: int) -> ConvConfig | None:
        """The convolutions of one layer, if it has any."""
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
    conv = parse_conv(raw["conv"], layers) if raw.get("conv") and model_type == "dynconv" else None
    if conv and experts and {"gate", "up", "down"} & set(conv.placement):
        raise ModelError("conv.placement: gate, up and down have no sequence inside experts")
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
        attention_bias=bool(raw.get("attention_bias", False)),
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=_qk_norm(raw, model_type),
        rope=parse_rope(raw, head_dim, max_positions),
        experts=experts,
        conv=conv,
        windows=_windows(raw, layers),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32").removeprefix("torch."),
        eos_token_ids=_eos(raw, generation or {}),
    )


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
    if not count or model_type in ("llama", "qwen3"):
        return None
    width = raw.get("moe_intermediate_size") or _int(raw, "intermediate_size")
    per_token = _int(raw, "num_experts_per_tok")
    if not 1 <= per_token <= count:
        raise ModelError(f"num_experts_per_tok {per_token} must be in 1..num_experts ({count})")
    return ExpertsConfig(count, per_token, width, bool(raw.get("norm_topk_prob", False)))


def _qk_norm(raw: dict[str, Any], model_type: str) -> Literal["none", "head", "full"]:
    by_type: dict[str, Literal["none", "head", "full"]]
    by_type = {"llama": "none", "qwen3": "head", "qwen3_moe": "head", "olmoe": "full"}
    value = raw.get("qk_norm", "none") if model_type == "dynconv" else by_type[model_type]
    if value not in ("none", "head", "full"):
        raise ModelError(f"qk_norm {value!r} must be none, head or full")
    return value


def _windows(raw: dict[str, Any], layers: int) -> tuple[int | None, ...]:
    window = raw.get("sliding_window")
    types = raw.get("layer_types") or ["full_attention"] * layers
    if len(types) != layers:
        raise ModelError(f"layer_types has {len(types)} entries for {layers} layers")
    unknown = set(types) - {"full_attention", "sliding_attention"}
    if unknown:
        raise ModelError(f"layer_types: {sorted(unknown)} not supported")
    if "sliding_attention" in types and not isinstance(window, int):
        raise ModelError("layer_types has sliding_attention but sliding_window is not set")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _eos(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id", raw.get("eos_token_id"))
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def _int(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{key} must be a positive integer, got {raw.get(key)!r}")
    return value
