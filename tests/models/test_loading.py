"""A folder that is not quite a model is refused in one line that names the key, tensor or file,
instead of serving nonsense."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from convserve.engine.models import ModelError, load_model
from convserve.engine.models.config import parse_config
from convserve.engine.models.rope import parse_rope, rope_table
from golden import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dynconv model that loads, to be damaged."""
    target = tmp_path / "model"
    shutil.copytree(GOLDEN / "models" / "dynconv_all_linear", target)
    return target


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def load(folder: Path) -> None:
    load_model(folder, torch.float32, CPU)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as raised:
        load(folder)
    message = str(raised.value)
    assert "\n" not in message
    for word in words:
        assert word in message


Q = "model.layers.0.self_attn.dynamic_conv_q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(f"{Q}.proj_out"), (f"{Q}.proj_out", "missing")),
        (lambda w: w.update(extra=torch.zeros(2)), ("extra", "not part of this model")),
        (
            lambda w: w.update({f"{Q}.proj_out": torch.zeros(8, 3)}),
            (f"{Q}.proj_out", "[8, 3]", "[8, 192]"),
        ),
        (
            lambda w: w[f"{Q}.proj_out_bias"][0].fill_(torch.nan),
            (f"{Q}.proj_out_bias", "not finite"),
        ),
        (lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}), ("int8",)),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Any, words: tuple[str, ...]) -> None:
    edit_weights(folder, change)
    refused(folder, *words)


def test_truncated_and_foreign_files_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    refused(folder, "model.safetensors", "damaged")
    weights.write_bytes(b"\x80\x04pickle, for all one knows")
    refused(folder, "model.safetensors")
    weights.unlink()
    refused(folder, "no weights")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json")
    (folder / "config.json").unlink()
    refused(folder, "not a model folder")


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "no weights")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["conv"].update(widht=4), ("conv.widht", "not a known key")),
        (lambda c: c["conv"].update(width=9), ("conv.width", "2..8", "9")),
        (lambda c: c["conv"].update(kind="dynamic"), ("conv.kind", "dynamic")),
        (lambda c: c["conv"].update(rank=0), ("conv.rank",)),
        (lambda c: c["conv"].update(placement=["q", "x"]), ("conv.placement",)),
        (lambda c: c["conv"].update(layers=[7]), ("conv.layers", "0..1")),
        (lambda c: c["conv"].update(activation="gelu"), ("conv.activation", "gelu")),
        (lambda c: c["conv"].update(output_scale="1"), ("conv.output_scale",)),
        (lambda c: c["conv"].update(bias=1), ("conv.bias",)),
        (lambda c: c.update(hidden_act="gelu"), ("hidden_act", "gelu")),
        (lambda c: c.update(num_hidden_layers=0), ("num_hidden_layers",)),
        (lambda c: c.update(num_key_value_heads=3), ("num_key_value_heads",)),
        (lambda c: c.update(qk_norm="both"), ("qk_norm",)),
        (lambda c: c.update(model_type="mystery"), ("mystery", "supported: dynconv")),
        (lambda c: c.update(rope_scaling={"rope_type": "longrope"}), ("longrope", "yarn")),
        (lambda c: c.update(rope_scaling={"type": "linear"}), ("linear", "factor")),
        (lambda c: c.update(quantization_config={"bits": 4}), ("quantization_config",)),
        (lambda c: c.update(num_experts=4, num_experts_per_tok=2), ("conv.placement", "experts")),
    ],
)
def test_wrong_configs_are_named(folder: Path, change: Any, words: tuple[str, ...]) -> None:
    edit_config(folder, change)
    refused(folder, "config.json", *words)


def test_head_size_that_does_not_divide(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "models" / "dynconv_headwise_qkv", tmp_path / "m")
    edit_config(tmp_path / "m", lambda c: c["conv"].update(head_size=7))
    refused(tmp_path / "m", "conv.head_size 7", "does not divide")


def shard(folder: Path, count: int = 3) -> dict[str, str]:
    """Rewrites the weights as shards with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for i in range(count):
        name = f"model-{i + 1:05}-of-{count:05}.safetensors"
        part = {k: v for j, (k, v) in enumerate(sorted(weights.items())) if j % count == i}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return weight_map


def test_shards_load_and_their_faults_are_named(folder: Path) -> None:
    whole = load_model(folder, torch.float32, CPU)
    weight_map = shard(folder)
    sharded = load_model(folder, torch.float32, CPU)
    assert sharded.num_elements == whole.num_elements
    index = folder / "model.safetensors.index.json"
    wrong = {**weight_map, "model.norm.weight": "../elsewhere.safetensors"}
    index.write_text(json.dumps({"weight_map": wrong}))
    refused(folder, "outside the folder")
    other = next(s for s in weight_map.values() if s != weight_map["model.norm.weight"])
    index.write_text(json.dumps({"weight_map": {**weight_map, "model.norm.weight": other}}))
    refused(folder, "model.norm.weight", "missing")
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / other).unlink()
    refused(folder, other, "missing")
    index.write_text("[]")
    refused(folder, "index.json")


def test_progress_reaches_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(folder, torch.float32, CPU, on_progress=lambda d, t: seen.append((d, t)))
    assert seen[-1][0] == seen[-1][1] > 0


def test_a_tied_head_that_is_stored_anyway_is_no_surplus(folder: Path) -> None:
    edit_weights(
        folder,
        lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}),
    )
    load(folder)


BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 10,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
}


def test_both_spellings_of_config_keys() -> None:
    old = parse_config({**BASE, "rope_theta": 5e5, "torch_dtype": "bfloat16"})
    new = parse_config({**BASE, "rope_parameters": {"rope_theta": 5e5}, "dtype": "bfloat16"})
    assert old == new
    assert old.rope.theta == 5e5
    assert old.dtype == "bfloat16"


def test_eos_ids_of_the_generation_config_win() -> None:
    assert parse_config({**BASE, "eos_token_id": 1}, {"eos_token_id": [2, 3]}).eos_token_ids == (
        2,
        3,
    )
    assert parse_config({**BASE, "eos_token_id": 1}).eos_token_ids == (1,)


def test_sliding_layers() -> None:
    config = {
        **BASE,
        "model_type": "qwen3",
        "sliding_window": 64,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    assert parse_config(config).windows == (None, 64)
    with pytest.raises(ModelError, match="linear_attention"):
        parse_config({**config, "layer_types": ["linear_attention"] * 2})


ROPE_KINDS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 512},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 1024,
    },
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "attention_factor": 1.25,
        "original_max_position_embeddings": 1024,
    },
]


@pytest.mark.parametrize("params", ROPE_KINDS, ids=lambda p: p["rope_type"])
@pytest.mark.parametrize("head_dim", [10, 64])
def test_rope_kinds_agree_with_transformers(params: dict[str, Any], head_dim: int) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_theta": 10000.0, **params}
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters=rope,
    )
    positions = torch.tensor([[0, 1, 2, 511, 512, 4095]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 1), positions)
    half = head_dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)
    mine = rope_table(parse_rope({"rope_parameters": rope}, head_dim, 4096), 4096, CPU)
    # theirs multiplies angles in float32: at position 4095 that is worth 1e-4
    torch.testing.assert_close(mine[positions[0]], expected, atol=5e-4, rtol=0)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists))
@settings(max_examples=80, deadline=None)
def test_any_conv_object_is_read_or_refused(value: Any) -> None:
    for raw in (value, {"kind": value}, {"kind": "lowrank", "width": value, "placement": value}):
        with suppress(ModelError):
            parse_config({**BASE, "model_type": "dynconv", "conv": raw})


def test_inspect_agrees_with_the_loaded_model() -> None:
    """What a token, a sequence and a hit of the prefix cache cost, before anything is loaded."""
    from convserve.engine.inspection import inspect_model

    folders = ("dynconv_all_linear", "hf_qwen3", "static_qkv", "dynconv_moe_qkv", "hf_lfm2")
    recurrent = ("hf_mamba2", "hf_qwen3_next", "jet_nemotron_tiny")
    for name in (*folders, *recurrent):
        folder = GOLDEN / "models" / name
        spec = load_model(folder, torch.float32, CPU).state_spec
        report = dict(line.split("  ", 1) for line in inspect_model(folder).splitlines())
        report = {key: value.strip() for key, value in report.items()}
        assert report["KV per token"] == f"{spec.kv_bytes_per_token:,} bytes"
        assert report["recurrent per sequence"] == f"{spec.recurrent_bytes:,} bytes"
        assert report["tail at a prefix"] == f"{spec.tail_bytes:,} bytes"
        replay = "none: a prefix is shared up to where a tail is stored"
        if name in recurrent:
            assert spec.tail_bytes > spec.recurrent_bytes > 0
        else:
            replay = f"{spec.replay_length} tokens"
        assert report["replay length"] == replay
