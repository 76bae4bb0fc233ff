"""Tiny GGUF files with known weights, laid out as llama.cpp's converter lays them out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers.pre_tokenizers import ByteLevel

if TYPE_CHECKING:
    from pathlib import Path

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, FFN, LAYERS = 4, 2, 16, 64, 96, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["1 2", "12 3", "123 4", "h e", "l l", "he ll", "hell o", "Ġ hello"]
TOKENS = [*SPECIALS, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@dataclass
class TinyGGUF:
    """What goes into the file; a test changes what it is about."""

    arch: str = "llama"
    pre: str = "smollm"
    weight_type: GGMLQuantizationType = GGMLQuantizationType.Q4_1
    tied: bool = True
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """More keys, without the architecture's prefix; a value of None leaves a key out."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """More keys, whole; a value of None leaves a key out."""
    spoil: set[str] = field(default_factory=set)
    """Tensors whose first value is infinite."""
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    """More tensors, as they are."""


def write_gguf(path: Path, tiny: TinyGGUF | None = None) -> dict[str, np.ndarray]:
    """Writes the file and returns the float32 weights that an import must give, by their names."""
    tiny = tiny or TinyGGUF()
    writer = GGUFWriter(path, tiny.arch)
    hyperparameters = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 100000.0,
        "rope.dimension_count": HEAD_DIM,
    } | tiny.hyperparameters
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": tiny.pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    } | tiny.metadata
    for key, value in ({f"{tiny.arch}.{k}": v for k, v in hyperparameters.items()}).items():
        _add(writer, key, value)
    for key, value in metadata.items():
        _add(writer, key, value)
    expected = _add_weights(writer, tiny)
    for name, tensor in tiny.tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    match value:
        case None:
            return
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _add_weights(writer: GGUFWriter, tiny: TinyGGUF) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    expected: dict[str, np.ndarray] = {}

    def add(name: str, published: str, shape: tuple[int, ...], heads: int = 0) -> None:
        weights = random.standard_normal(shape).astype(np.float32)
        if name in tiny.spoil:
            weights[0] = np.inf
        kind = GGMLQuantizationType.F32
        if len(shape) == 2:
            is_head = name in ("token_embd.weight", "output.weight")
            kind = GGMLQuantizationType.Q8_0 if is_head else tiny.weight_type
        encoded = quantize(weights, kind)
        expected[published] = dequantize(encoded, kind)
        if heads:  # the converter's permutation: halves of a head become interleaved pairs
            halves = weights.reshape(heads, 2, shape[0] // heads // 2, shape[1])
            encoded = quantize(halves.swapaxes(1, 2).reshape(shape), kind)
        writer.add_tensor(name, encoded, raw_dtype=kind)

    interleaved = tiny.arch == "llama"
    add("token_embd.weight", "model.embed_tokens.weight", (len(TOKENS), HIDDEN))
    for layer in range(LAYERS):
        blk, pub = f"blk.{layer}", f"model.layers.{layer}"
        rows, kv_rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        attn = f"{pub}.self_attn"
        add(f"{blk}.attn_norm.weight", f"{pub}.input_layernorm.weight", (HIDDEN,))
        add(f"{blk}.attn_q.weight", f"{attn}.q_proj.weight", (rows, HIDDEN), interleaved * HEADS)
        kv_heads = interleaved * KV_HEADS
        add(f"{blk}.attn_k.weight", f"{attn}.k_proj.weight", (kv_rows, HIDDEN), kv_heads)
        add(f"{blk}.attn_v.weight", f"{attn}.v_proj.weight", (kv_rows, HIDDEN))
        add(f"{blk}.attn_output.weight", f"{attn}.o_proj.weight", (HIDDEN, rows))
        if tiny.arch == "qwen3":
            add(f"{blk}.attn_q_norm.weight", f"{attn}.q_norm.weight", (HEAD_DIM,))
            add(f"{blk}.attn_k_norm.weight", f"{attn}.k_norm.weight", (HEAD_DIM,))
        add(f"{blk}.ffn_norm.weight", f"{pub}.post_attention_layernorm.weight", (HIDDEN,))
        add(f"{blk}.ffn_gate.weight", f"{pub}.mlp.gate_proj.weight", (FFN, HIDDEN))
        add(f"{blk}.ffn_up.weight", f"{pub}.mlp.up_proj.weight", (FFN, HIDDEN))
        add(f"{blk}.ffn_down.weight", f"{pub}.mlp.down_proj.weight", (HIDDEN, FFN))
    add("output_norm.weight", "model.norm.weight", (HIDDEN,))
    if not tiny.tied:
        add("output.weight", "lm_head.weight", (len(TOKENS), HIDDEN))
    return expected
