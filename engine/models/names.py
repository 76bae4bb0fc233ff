"""What families call the same tensors. Knows names alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class TensorNames:
    """Names of a checkpoint's modules; Llama's unless said otherwise."""

    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    layers: str = "model.layers"
    mixer_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    mixer: str = "mixer"
    """Of layers that are not attention."""
    mlp: str = "mlp"
    linears: Mapping[str, str] = field(default_factory=dict)
    """Of linear layers by place (q, k, v, o, gate, up, down), where not `{place}_proj`."""
    qk_norms: tuple[str, str] = ("q_norm", "k_norm")

    def linear(self, place: str) -> str:
        """The linear layer of a place."""
        return self.linears.get(place, f"{place}_proj")


LLAMA = TensorNames()
LFM2 = TensorNames(
    norm="model.embedding_norm",
    mixer_norm="operator_norm",
    mlp_norm="ffn_norm",
    mixer="conv",
    mlp="feed_forward",
    linears={"o": "out_proj", "gate": "w1", "up": "w3", "down": "w2"},
    qk_norms=("q_layernorm", "k_layernorm"),
)
MAMBA2 = TensorNames(
    embeddings="backbone.embeddings",
    norm="backbone.norm_f",
    layers="backbone.layers",
    mixer_norm="norm",
)
QWEN3_NEXT = TensorNames(mixer="linear_attn")
JET_NEMOTRON = TensorNames(mixer="self_attn")
