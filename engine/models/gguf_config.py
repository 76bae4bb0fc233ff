"""config.json and generation_config.json from the metadata of a GGUF file.

It knows which architectures the engine serves and refuses, by name, any hyperparameter it would
otherwise drop in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .gguf_file import GGUFFile


@dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture is spelled in a Hugging Face folder."""

    model_type: str
    class_name: str
    interleaved: bool
    """The format stores q and k rows in interleaved RoPE pairs."""
    qk_norm: bool


ARCHITECTURES = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True, qk_norm=False),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", interleaved=False, qk_norm=True),
}

READ_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
    }
)
INERT_KEYS = frozenset({"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"})


def architecture_of(file: GGUFFile) -> Architecture:
    name = file.read("general.architecture", str)
    if name not in ARCHITECTURES:
        allowed = ", ".join(ARCHITECTURES)
        raise file.error(f"architecture {name} is not supported (supported: {allowed})")
    return ARCHITECTURES[name]


def model_config(file: GGUFFile) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        ModelError: an architecture, hyperparameter or RoPE scaling that is not supported.
    """
    architecture = architecture_of(file)
    prefix = file.read("general.architecture", str) + "."
    for key in file.keys:
        if key.startswith(prefix) and key.removeprefix(prefix) not in READ_KEYS | INERT_KEYS:
            raise file.error(f"metadata key {key} is not supported")
    hidden = file.read(prefix + "embedding_length", int)
    heads = file.read(prefix + "attention.head_count", int)
    if heads < 1:
        raise file.error(f"metadata key {prefix}attention.head_count is {heads}, must be >= 1")
    head_dim = file.read(prefix + "attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := file.read(prefix + key, int, head_dim)) != head_dim:
            raise file.error(f"metadata key {prefix}{key} is {size}, must be the head's {head_dim}")
    shapes = {tensor.name: tensor.shape for tensor in file.tensors}
    if "token_embd.weight" not in shapes:
        raise file.error("tensor token_embd.weight is missing")
    rope_theta = _shortest(file.read(prefix + "rope.freq_base", float, 10000.0))
    return {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "hidden_size": hidden,
        "intermediate_size": file.read(prefix + "feed_forward_length", int),
        "num_hidden_layers": file.read(prefix + "block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": file.read(prefix + "attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _shortest(file.read(prefix + "attention.layer_norm_rms_epsilon", float)),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(file, prefix, rope_theta, head_dim),
        "max_position_embeddings": file.read(prefix + "context_length", int),
        "attention_bias": False,
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": "bfloat16",
    } | _special_ids(file)


def generation_config(file: GGUFFile) -> dict[str, Any]:
    """The contents of generation_config.json: special ids, with the end of a turn among eos."""
    ids = _special_ids(file)
    eos, eot = ids.get("eos_token_id"), file.find("tokenizer.ggml.eot_token_id")
    if eos is not None and eot is not None and eos != eot:
        ids["eos_token_id"] = [eos, eot]
    return ids


def _special_ids(file: GGUFFile) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: file.find(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}


def _shortest(stored: float) -> float:
    """The shortest decimal that is the same float32 (1e-05 is stored as 9.99999974e-06)."""
    return float(str(np.float32(stored)))


def _rope_scaling(
    file: GGUFFile, prefix: str, rope_theta: float, head_dim: int
) -> dict[str, Any] | None:
    kind = file.read(prefix + "rope.scaling.type", str, "none")
    factors = [tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight"]
    if factors:
        if kind != "none":
            raise file.error(f"RoPE scaling {kind} together with tensor rope_freqs.weight")
        return _llama3_scaling(file, np.asarray(factors[0].data), rope_theta, head_dim)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise file.error(f"RoPE scaling {kind} is not supported (supported: none, linear, yarn)")
    scaling = {
        "rope_type": kind,
        "factor": _shortest(file.read(prefix + "rope.scaling.factor", float)),
    }
    if kind == "yarn":
        key = prefix + "rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = file.read(key, int)
    return scaling


def _llama3_scaling(
    file: GGUFFile, factors: np.ndarray, rope_theta: float, head_dim: int
) -> dict[str, Any]:
    """Llama 3 scaling from the frequency divisors that it gave.

    The file holds the divisors alone. All published models of the kind share three of the four
    parameters, and the largest divisor is the fourth; divisors that disagree are refused.
    """
    low, high, original = 1.0, 4.0, 8192
    frequencies = rope_theta ** -(np.arange(0, head_dim, 2) / head_dim)
    factor = _shortest(float(factors.max()))
    smooth = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise file.error("tensor rope_freqs.weight is not of the llama3 RoPE scaling")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
