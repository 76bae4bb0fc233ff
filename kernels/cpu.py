"""Ops for CPUs, in torch alone: linears whose weights oneDNN has laid out beforehand.

Everything else is the reference. The fallback of `native_ops`, and the base it overrides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import Ops, PackedLinear


class CpuOps(Ops):
    """Reference ops with prepacked bfloat16 linears."""

    name = "cpu"

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `Ops.pack_linear`. The packed weight replaces the dense one; keep no other copy."""
        out_features, in_features = weight.shape
        if weight.dtype == torch.bfloat16 and _onednn_multiplies_bfloat16():
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        return PackedLinear(weight, bias, in_features, out_features)

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See `Ops.linear`."""
        if packed.weight.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
        return F.linear(x, packed.weight, packed.bias)


def _onednn_multiplies_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
