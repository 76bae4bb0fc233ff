"""LlamaCanon checkpoints mean what their model code says: convolutions of the normed inputs, of q,
k, v after their full-width norm, and of gate and up; RoPE on neighbouring channels of a part of
each head. Compared with a loop that knows no state, whole, in chunks and after a replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from convserve.cache.pools import SequenceId
from convserve.engine.models import ModelError, load_model
from convserve.engine.models.config import parse_config
from model_bench import TOKENS, Bench, sequence
from tiny_canon import CANON, DIM, EPS, HEADS, KV, LAYERS, WIDTH, write_canon

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "all, lingua": {},
    "all, whole heads": {"rope_version": "huggingface", "rope_dim": None, "qk_norm": False},
    "no residual": {"canon_residual": False, "canon_set": "BD"},
    "before the blocks alone": {"canon_set": "AC", "rope_dim": None},
    "none": {"canon_set": ""},
}


def naive(config: dict[str, Any], stored: dict[str, Tensor], tokens: list[int]) -> Tensor:
    """Logits of a whole sequence, in float64."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in stored.items()}

    def canon(name: str, x: Tensor) -> Tensor:
        if name not in w:
            return x
        padded = F.pad(x.T, (WIDTH - 1, 0))
        y = F.conv1d(padded[None], w[name], groups=x.shape[1])[0].T
        return x + y if config["canon_residual"] else y

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w[name]

    def turn(x: Tensor) -> Tensor:
        width = config["rope_dim"] or DIM
        inverse = 10000.0 ** -(torch.arange(0, width, 2).double() / width)
        angle = torch.outer(torch.arange(len(tokens)).double(), inverse)[:, None]
        lingua = config["rope_version"] == "lingua"
        even, odd = torch.arange(width // 2), torch.arange(width // 2)
        even, odd = (2 * even, 2 * odd + 1) if lingua else (even, odd + width // 2)
        y = x.clone()
        y[..., even] = x[..., even] * angle.cos() - x[..., odd] * angle.sin()
        y[..., odd] = x[..., odd] * angle.cos() + x[..., even] * angle.sin()
        return y

    x = w["model.embed_tokens"][tokens]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        g = canon(f"{layer}.canonA", rms(x, f"{layer}.input_layernorm"))
        q, k, v = (g @ w[f"{attn}.{p}_proj"].T for p in "qkv")
        if config["qk_norm"]:
            q, k = rms(q, f"{attn}.q_norm"), rms(k, f"{attn}.k_norm")
        qkv = canon(f"{attn}.canonB", torch.cat((q, k, v), 1)).unflatten(1, (-1, DIM))
        q, k, v = qkv.split((HEADS, KV, KV), 1)
        k, v = (y.repeat_interleave(HEADS // KV, 1).transpose(0, 1) for y in (turn(k), v))
        scores = turn(q).transpose(0, 1) @ k.transpose(1, 2) * DIM**-0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        out = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + out @ w[f"{attn}.o_proj"].T
        g = canon(f"{layer}.canonC", rms(x, f"{layer}.post_attention_layernorm"))
        both = torch.cat((g @ w[f"{mlp}.gate_proj"].T, g @ w[f"{mlp}.up_proj"].T), 1)
        gate, up = canon(f"{mlp}.canonD", both).chunk(2, 1)
        x = x + (F.silu(gate) * up) @ w[f"{mlp}.down_proj"].T
    return rms(x, "model.norm") @ w["lm_head"].T


@pytest.mark.parametrize("case", CASES)
def test_canon_means_what_its_code_says(case: str, tmp_path: Path) -> None:
    config = {**CANON, **CASES[case]}
    expected = naive(config, write_canon(tmp_path / "m", config), TOKENS)
    model = load_model(tmp_path / "m", torch.float64, CPU, backend="reference")
    assert (
        model.state_spec.replay_length
        == LAYERS * 3 * ({"all": 4, "no ": 2, "bef": 2, "non": 0}[case[:3]])
    )
    for chunk in (len(TOKENS), 3, 1):
        bench = Bench(model, num_tails=0)
        assert bench.cache.admit(SequenceId(1), TOKENS)
        got = bench.run(sequence(1), chunk)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    admission = bench.cache.admit(SequenceId(2), TOKENS)
    assert admission is not None
    assert admission.start > 0
    got = bench.run(sequence(2, admission.start), 7, last=2)
    torch.testing.assert_close(got, expected[-2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [("canon_activation", True), ("canon_bias", True), ("canon_set", "ABE"), ("rope_version", "x")],
)
def test_options_that_are_not_served_are_named(key: str, value: Any) -> None:
    with pytest.raises(ModelError, match=key):
        parse_config({**CANON, key: value})
