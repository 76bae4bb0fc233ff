"""Weights of ops, in the form that ops take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class QKNorm:
    """RMSNorm of queries and keys."""

    mode: Literal["head", "full"]
    """head: over each head's channels, weight [head_dim]. full: over the whole projection."""
    order: Literal["conv_first", "norm_first"]
    """Whether the convolution reads raw projections or normed ones."""
    q: Tensor
    k: Tensor
    eps: float


@dataclass(frozen=True)
class PackedLinear:
    """Weights of `y = x W^T + b` in whatever form the backend multiplies fastest.

    `weight` is [out, in] for the reference backend and opaque to everybody but the backend that
    packed it.
    """

    weight: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
