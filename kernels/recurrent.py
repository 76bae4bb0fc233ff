"""What the linear recurrences of a layer are made of; `Ops.delta_rule` and `Ops.ssd` say what they
do with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .weights import PackedLinear


@dataclass(frozen=True)
class DeltaParts:
    """A gated delta rule and the gated norm after it."""

    key_heads: int
    value_heads: int
    """A multiple of key_heads; value head h reads key head h // (value_heads // key_heads)."""
    key_dim: int
    value_dim: int
    silu: tuple[bool, bool, bool]
    """Whether q, k and v are still to go through SiLU."""
    rate: Tensor
    """[value_heads] float32, -exp(A_log)."""
    dt_bias: Tensor
    """[value_heads] float32."""
    norm: Tensor
    """[value_dim]."""
    eps: float
    generator: PackedLinear | None = None
    """From SiLU of the z columns to the filters; None where z is their code itself."""

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        key = self.key_heads * self.key_dim
        return key, key, self.value_heads * self.value_dim


@dataclass(frozen=True)
class SSDParts:
    """Mamba-2's selective state space and the gated norm after it."""

    heads: int
    head_dim: int
    groups: int
    """Heads of a group share B and C; norms are over a group's channels."""
    state_dim: int
    rate: Tensor
    """[heads] float32, -exp(A_log)."""
    dt_bias: Tensor
    """[heads] float32."""
    skip: Tensor
    """[heads] float32, D."""
    norm: Tensor
    """[heads * head_dim]."""
    eps: float

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of x, B and C."""
        shared = self.groups * self.state_dim
        return self.heads * self.head_dim, shared, shared
