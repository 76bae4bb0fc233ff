"""Hybrid families: each one's config.json told in Llama's keys, with what Llama has no key for.

One function per model_type. Options that would change the mathematics and are not served are
refused by name.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .conv_config import ConvConfig, Place
from .errors import ModelError
from .mixers import Attention, GatedDelta, Mamba2, Mixer, ShortConv, positive
from .names import JET_NEMOTRON, LFM2, LLAMA, MAMBA2, QWEN3_NEXT, TensorNames

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Family:
    """A config in Llama's keys, and the rest."""

    raw: dict[str, Any]
    mixers: tuple[Mixer, ...]
    names: TensorNames = LLAMA
    qk_norm: Literal["none", "head", "full"] = "none"
    has_mlp: bool = True
    bias_o: bool | None = None
    """Whether o has a bias; None: as q, k and v."""
    attention_gate: bool = False
    norm_offset: float = 0.0
    conv: ConvConfig | None = None
    interleaved_rope: bool = False


def lfm2(raw: Mapping[str, Any]) -> Family:
    """LFM2: gated short convolutions and attention."""
    layers = positive(raw, "num_hidden_layers")
    hidden = positive(raw, "hidden_size")
    for key, only in (
        ("conv_dim", hidden),
        ("conv_dim_out", hidden),
        ("block_dim", hidden),
        ("block_use_swiglu", True),
        ("use_pos_enc", True),
    ):
        _only(raw, key, only)
    types = raw.get("layer_types")
    if types is None:
        attention = raw.get("full_attn_idxs")
        attention = range(layers) if attention is None else attention
        types = ["full_attention" if i in attention else "conv" for i in range(layers)]
    conv = ShortConv(_width(raw, "conv_L_cache", 3), bool(raw.get("conv_bias", False)))
    width = raw.get("block_ff_dim") or positive(raw, "intermediate_size")
    if raw.get("block_auto_adjust_ff_dim", True):
        multiple = positive(raw, "block_multiple_of", 256)
        width = int(2 * width / 3)
        if raw.get("block_ffn_dim_multiplier", 1.0) is not None:
            width = int(raw.get("block_ffn_dim_multiplier", 1.0) * width)
            width = multiple * -(-width // multiple)
    told = {
        **raw,
        "layer_types": None,
        "intermediate_size": width,
        "rms_norm_eps": raw.get("norm_eps", 1e-5),
        "tie_word_embeddings": raw.get("tie_embedding", raw.get("tie_word_embeddings", True)),
        "rope_theta": raw.get("rope_theta", raw.get("theta", 1e6)),
    }
    mixers = _mixers(types, layers, {"conv": conv, "full_attention": Attention()})
    return Family(told, mixers, LFM2, qk_norm="head")


def mamba2(raw: Mapping[str, Any]) -> Family:
    """Mamba-2: no attention, no MLP, no positions."""
    layers, hidden = positive(raw, "num_hidden_layers"), positive(raw, "hidden_size")
    _only(raw, "rms_norm", True)
    _only(raw, "norm_before_gate", False)
    limit = raw.get("time_step_limit") or (0.0, float("inf"))
    low, high = (float(x["__float__"]) if isinstance(x, dict) else float(x) for x in limit)
    if (low, high) != (0.0, float("inf")):
        raise ModelError(f"time_step_limit {[low, high]} is not supported (supported: [0, inf])")
    mixer = Mamba2(
        heads=positive(raw, "num_heads", 128),
        head_dim=positive(raw, "head_dim", 64),
        groups=positive(raw, "n_groups", 8),
        state_dim=positive(raw, "state_size", 128),
        eps=float(raw.get("layer_norm_epsilon", 1e-5)),
        layout="mamba2",
        width=_width(raw, "conv_kernel", 4),
        bias=bool(raw.get("use_bias", False)),
        conv_bias=bool(raw.get("use_conv_bias", True)),
    )
    if raw.get("expand", 2) * hidden != mixer.inner:
        raise ModelError(
            f"expand {raw.get('expand', 2)} times hidden_size {hidden} is not num_heads "
            f"{mixer.heads} times head_dim {mixer.head_dim}"
        )
    if mixer.heads % mixer.groups:
        raise ModelError(f"n_groups {mixer.groups} does not divide {mixer.heads} heads")
    told = {
        **raw,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 1,
        "intermediate_size": 1,
        # The state has no positions: a bound for page tables alone.
        "max_position_embeddings": positive(raw, "max_position_embeddings", 1 << 17),
        "rms_norm_eps": mixer.eps,
    }
    return Family(told, (mixer,) * layers, MAMBA2, has_mlp=False)


def qwen3_next(raw: Mapping[str, Any]) -> Family:
    """Qwen3-Next: Gated DeltaNet, gated attention, experts with a shared one."""
    layers = positive(raw, "num_hidden_layers")
    delta = GatedDelta(
        key_heads=positive(raw, "linear_num_key_heads", 16),
        value_heads=positive(raw, "linear_num_value_heads", 32),
        key_dim=positive(raw, "linear_key_head_dim", 128),
        value_dim=positive(raw, "linear_value_head_dim", 128),
        eps=float(raw.get("rms_norm_eps", 1e-6)),
        layout="qwen3_next",
        width=_width(raw, "linear_conv_kernel_dim", 4),
    )
    if delta.value_heads % delta.key_heads:
        raise ModelError(
            f"linear_num_key_heads {delta.key_heads} does not divide {delta.value_heads}"
        )
    _only(raw, "attention_bias", False)
    types = raw.get("layer_types")
    if types is None:
        every = positive(raw, "full_attention_interval", 4)
        types = ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    partial = raw.get("partial_rotary_factor", 0.25)
    told = {**raw, "layer_types": None, "partial_rotary_factor": partial}
    told.setdefault("head_dim", 256)
    mixers = _mixers(types, layers, {"linear_attention": delta, "full_attention": Attention()})
    return Family(told, mixers, QWEN3_NEXT, qk_norm="head", attention_gate=True, norm_offset=1.0)


def jet_nemotron(raw: Mapping[str, Any]) -> Family:
    """Jet-Nemotron: delta rule with dynamically convolved values; full and windowed attention."""
    layers = positive(raw, "num_hidden_layers")
    types = raw.get("layer_types")
    if isinstance(types, str):
        try:
            types = ast.literal_eval(types)
        except (ValueError, SyntaxError):
            raise ModelError(f"layer_types {types!r} is not a list") from None
    options = raw.get("efficient_attention_config") or {}
    jet = _options(
        options.get("jet"),
        "efficient_attention_config.jet",
        {"mode", "expand_v", "num_heads", "head_dim", "norm_eps", "conv_size"}
        | {"dconv_generator_reduction", "dconv_implementation"},
    )
    swa = _options(options.get("swa"), "efficient_attention_config.swa", {"window_size"})
    heads, key_dim = positive(jet, "num_heads", 6), positive(jet, "head_dim", 256)
    value_dim = int(key_dim * float(jet.get("expand_v", 2.0)))
    if int(heads * key_dim * float(jet.get("expand_v", 2.0))) != heads * value_dim:
        raise ModelError(
            f"efficient_attention_config.jet.expand_v {jet['expand_v']!r} does not give every head "
            "the same number of value channels"
        )
    reduction = positive(jet, "dconv_generator_reduction", 8)
    delta = GatedDelta(
        heads,
        heads,
        key_dim,
        value_dim,
        eps=float(jet.get("norm_eps", 1e-5)),
        layout="jet_nemotron",
        width=_width(jet, "conv_size", 4),
        generator_hidden=heads * value_dim // reduction,
    )
    kinds: dict[str, Mixer] = {"jet": delta, "attn": Attention()}
    if "window_size" in swa:
        window = positive(swa, "window_size", within="efficient_attention_config.swa")
        kinds["swa"] = Attention(window)
    told = {**raw, "layer_types": None, "attention_bias": True}
    told.setdefault("rope_theta", 1e6)
    return Family(told, _mixers(types, layers, kinds), JET_NEMOTRON, bias_o=False)


def llama_canon(raw: Mapping[str, Any]) -> Family:
    """LlamaCanon: static residual convolutions before, between and after the linear layers."""
    layers = positive(raw, "num_hidden_layers")
    _only(raw, "canon_activation", False)
    _only(raw, "canon_bias", False)
    letters = raw.get("canon_set", "")
    sites: dict[str, tuple[Place, ...]] = {
        "A": ("mixer_in",),
        "B": ("q", "k", "v"),
        "C": ("mlp_in",),
        "D": ("gate", "up"),
    }
    unknown = sorted(set(letters) - sites.keys())
    if unknown:
        raise ModelError(f"canon_set {letters!r}: {unknown} not supported (supported: A B C D)")
    version = raw.get("rope_version", "huggingface")
    if version not in ("huggingface", "lingua"):
        raise ModelError(f"rope_version {version!r} must be huggingface or lingua")
    conv = None
    if letters:
        conv = ConvConfig(
            kind="static",
            width=_width(raw, "canon_kernel", 4),
            rank=0,
            head_size=0,
            placement=tuple(place for letter in sorted(set(letters)) for place in sites[letter]),
            residual=bool(raw.get("canon_residual", True)),
            bias=False,
            activation=None,
            generator_input="linear_input",
            qk_norm_order="norm_first",
            tap_order="oldest_first",
            output_scale=1.0,
            layers=None,
            stored="canon",
        )
    told = dict(raw)
    if raw.get("rope_dim") is not None:
        heads = positive(raw, "num_attention_heads")
        head_dim = positive(raw, "head_dim", positive(raw, "hidden_size") // heads)
        told["partial_rotary_factor"] = positive(raw, "rope_dim") / head_dim
    return Family(
        told,
        (Attention(),) * layers,
        qk_norm="full" if raw.get("qk_norm") else "none",
        conv=conv,
        interleaved_rope=version == "lingua",
    )


FAMILIES: dict[str, Callable[[Mapping[str, Any]], Family]] = {
    "LlamaCanon": llama_canon,
    "jet_nemotron": jet_nemotron,
    "lfm2": lfm2,
    "mamba2": mamba2,
    "qwen3_next": qwen3_next,
}


def _mixers(types: Any, layers: int, kinds: Mapping[str, Mixer]) -> tuple[Mixer, ...]:
    if not isinstance(types, list) or len(types) != layers:
        raise ModelError(f"layer_types must list {layers} layers, got {types!r}")
    unknown = sorted({str(t) for t in types} - kinds.keys())
    if unknown:
        raise ModelError(f"layer_types: {unknown} not supported (supported: {sorted(kinds)})")
    return tuple(kinds[t] for t in types)


def _options(raw: Any, name: str, known: set[str]) -> dict[str, Any]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ModelError(f"{name} must be an object, got {raw!r}")
    for key in raw:
        if key not in known:
            raise ModelError(f"{name}.{key} is not a known key (known: {', '.join(sorted(known))})")
    return raw


def _only(raw: Mapping[str, Any], key: str, supported: Any) -> None:
    value = raw.get(key, supported)
    if value is not None and value != supported:
        raise ModelError(f"{key} {value!r} is not supported (supported: {supported!r})")


def _width(raw: Mapping[str, Any], key: str, default: int) -> int:
    width = positive(raw, key, default)
    if not 2 <= width <= 8:
        raise ModelError(f"{key} {width} must be in 2..8")
    return width
