"""The kernel contract: every op a model may call, as plain torch, carried state included.

`Ops` *is* the specification: each method is the reference that other backends (Triton on a GPU,
native code on a CPU) override with the same signature and are compared with. The CPU backend runs
these methods wherever it has nothing faster.

Shapes: T rows of the flat batch, S sequences, D convolved channels, W taps. Arithmetic inside an
op is float32 (float64 for float64 inputs) with one rounding to the input dtype at its end.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from . import reference_attention, reference_conv, reference_recurrent
from .reference_rows import apply_rope, moe, norm_qk, rms_norm, silu_mul, widen
from .token_ops import TokenOps
from .weights import PackedLinear, QKNorm

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from .batch import FlatBatch
    from .blocks import AttentionParts, MLPParts
    from .filters import ConvFilter
    from .recurrent import DeltaParts, SSDParts


class Ops(TokenOps):
    """Reference implementation of every op; other backends override methods."""

    name = "reference"
    is_capturable = False
    """No op waits for the device or needs the batch's spans, so that a graph can hold a step."""

    def compiling(self) -> AbstractContextManager[bool]:
        """Inside, if it gives True, ops compile what they would launch, and launch nothing: no
        result is written. On leaving, all of it is ready."""
        return nullcontext(False)

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """Prepares weight [out, in] (and bias [out]) once, at load."""
        return PackedLinear(weight, bias, weight.shape[1], weight.shape[0])

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """x [T, in] -> [T, out]."""
        return F.linear(x, packed.weight, packed.bias)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up. gate_up [T, 2 I] -> [T, I]."""
        return silu_mul(gate_up)

    def silu_linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """`silu_mul` of a linear layer's output. x [T, in] -> [T, out / 2]."""
        return self.silu_mul(self.linear(x, packed))

    def pack_tied(self, table: Tensor) -> tuple[Tensor | PackedLinear, PackedLinear]:
        """For tied weights [V, H]: what `embed` reads and what `linear` multiplies by."""
        return table, self.pack_linear(table, None)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last axis. x [..., H], weight [H]."""
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Residual add, then RMSNorm. x, residual [T, H] -> (normed, x + residual)."""
        residual = residual + x
        return self.rms_norm(residual, weight, eps), residual

    def linear_add_rms_norm(
        self, x: Tensor, packed: PackedLinear, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """`add_rms_norm` of a linear layer's output. x [T, in], residual [T, out]."""
        return self.add_rms_norm(self.linear(x, packed), residual, weight, eps)

    def conv(
        self, x: Tensor, z: Tensor | None, filters: ConvFilter, ring: Tensor, batch: FlatBatch
    ) -> Tensor:
        """The convolution alone: generates filters from z, applies them, leaves the ring right.

        Args:
            x: [T, C] inputs of this step, possibly a column slice of a wider tensor.
            z: [T, Z] generator output (all streams side by side); None for static filters.
            ring: [slots, ring_len, D]; read for taps before this step's rows, then written.

        Returns:
            [T, C]; channels that no stream covers are x unchanged.
        """
        return reference_conv.conv(x, z, filters, ring, batch)

    def qkv_rope_write(
        self,
        qkv: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        norm: QKNorm | None,
        rope: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: FlatBatch,
    ) -> Tensor:
        """Convolution of q, k, v, QK-norm in either order, RoPE, and the store into KV pages.

        Args:
            qkv: [T, (Hq + 2 Hkv) * d], q then k then v, possibly a column slice.
            z, filters, ring: as `conv`, over the qkv channels; filters None for no convolution.
            rope: [T, rot] float32, cos then sin (rot / 2 each) of each row's position; rotates
                the first `rot` channels of each head in halves, leaves the rest.
            k_pages, v_pages: [pages, Hkv, page_size, d]; rows go to `batch.kv_rows`.

        Returns:
            q [T, Hq, d], contiguous.
        """
        kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
        kv_width = kv_heads * head_dim
        if norm is not None and norm.order == "norm_first":
            qkv = norm_qk(qkv, norm, kv_width, head_dim, self.rms_norm)
        if filters is not None:
            assert ring is not None
            qkv = self.conv(qkv, z, filters, ring, batch)
        if norm is not None and norm.order == "conv_first":
            qkv = norm_qk(qkv, norm, kv_width, head_dim, self.rms_norm)
        heads = qkv.unflatten(1, (-1, head_dim))
        q_heads = qkv.shape[1] // head_dim - 2 * kv_heads
        roped = apply_rope(heads[:, : q_heads + kv_heads], rope)
        reference_attention.store_kv(roped[:, q_heads:], k_pages, batch)
        reference_attention.store_kv(heads[:, q_heads + kv_heads :], v_pages, batch)
        return roped[:, :q_heads].contiguous()

    def attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: FlatBatch,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """Causal attention over the paged cache, which already holds this step's K and V.

        A row at position p sees positions max(0, p - window + 1) .. p of its sequence.

        Args:
            q: [T, Hq, d]. k_pages, v_pages: [pages, Hkv, page_size, d]; Hkv divides Hq.

        Returns:
            [T, Hq * d].
        """
        return reference_attention.attention(q, k_pages, v_pages, batch, scale, window)

    def conv_add_rms_norm(
        self,
        x: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor]:
        """Convolution after o or down, residual add, next RMSNorm.

        x, residual [T, H] -> (normed [T, H], new residual [T, H]). filters None: no convolution.
        """
        if filters is not None:
            assert ring is not None
            x = self.conv(x, z, filters, ring, batch)
        return self.add_rms_norm(x, residual, weight, eps)

    def conv_silu_mul(
        self,
        gate_up: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        batch: FlatBatch,
    ) -> Tensor:
        """Convolution after gate and up, then `silu_mul`. gate_up [T, 2 I] -> [T, I]."""
        if filters is not None:
            assert ring is not None
            gate_up = self.conv(gate_up, z, filters, ring, batch)
        return self.silu_mul(gate_up)

    def attention_block(
        self,
        parts: AttentionParts,
        x: Tensor,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        rope: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        rings: Mapping[str, Tensor],
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor]:
        """q, k, v -> convolution, norm, RoPE -> attention -> o -> convolution, residual, next norm.

        A backend may run the chain as one call. x, residual [T, hidden] -> (normed input of the
        next block, residual). `norm` and `eps` are the next block's; rings are "qkv" and "o".
        """
        p = parts
        out = self.linear(x, p.qkv)
        q = self.qkv_rope_write(
            out[:, : (p.q_heads + 2 * p.kv_heads) * p.head_dim],
            p.qkv_conv.code(out),
            p.qkv_conv.filters,
            rings.get("qkv"),
            p.qk_norm,
            rope,
            k_pages,
            v_pages,
            batch,
        )
        attended = self.attention(q, k_pages, v_pages, batch, p.head_dim**-0.5, p.window)
        if p.o_conv.filters is None and p.o.out_features == residual.shape[1]:
            return self.linear_add_rms_norm(attended, p.o, residual, norm, eps)
        y = self.linear(attended, p.o)
        return self.conv_add_rms_norm(
            y[:, : residual.shape[1]],
            p.o_conv.code(out if p.o_code_from_input else y),
            p.o_conv.filters,
            rings.get("o"),
            residual,
            norm,
            eps,
            batch,
        )

    def mlp_block(
        self,
        parts: MLPParts,
        x: Tensor,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        rings: Mapping[str, Tensor],
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor]:
        """gate, up -> convolution, SiLU product -> down -> convolution, residual, next norm.

        As `attention_block`; rings are "gate_up" and "down".
        """
        p = parts
        if p.gate_up_conv.filters is None and p.gate_up.out_features == 2 * p.intermediate:
            hidden = out = self.silu_linear(x, p.gate_up)
        else:
            out = self.linear(x, p.gate_up)
            hidden = self.conv_silu_mul(
                out[:, : 2 * p.intermediate],
                p.gate_up_conv.code(out),
                p.gate_up_conv.filters,
                rings.get("gate_up"),
                batch,
            )
        if p.down_conv.filters is None and p.down.out_features == residual.shape[1]:
            return self.linear_add_rms_norm(hidden, p.down, residual, norm, eps)
        y = self.linear(hidden, p.down)
        return self.conv_add_rms_norm(
            y[:, : residual.shape[1]],
            p.down_conv.code(out if p.down_code_from_input else y),
            p.down_conv.filters,
            rings.get("down"),
            residual,
            norm,
            eps,
            batch,
        )

    def gated_conv(self, x: Tensor, filters: ConvFilter, ring: Tensor, batch: FlatBatch) -> Tensor:
        """A convolution between two gates: x [T, 3 D] is b, c, x side by side; c * conv(b * x).

        The convolution's input, and so what the ring holds, is the product. -> [T, D].
        """
        b, c, inner = x.chunk(3, dim=1)
        return c * self.conv(b * inner, None, filters, ring, batch)

    def delta_rule(
        self,
        parts: DeltaParts,
        qkv: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        gate: Tensor,
        b: Tensor,
        a: Tensor,
        state: Tensor,
        batch: FlatBatch,
    ) -> Tensor:
        """Convolution of q, k, v, the gated delta rule over carried state, and its gated norm.

        q and k are divided by their norms per head, q times key_dim^-0.5; beta = sigmoid(b);
        g = rate * softplus(a + dt_bias). Per head, S <- exp(g) S; S <- S + k (beta (v - S^T k))^T;
        o = S^T q; the output is RMSNorm(o) * silu(gate).

        Args:
            qkv: [T, 2 Hk K + Hv V], q then k then v. gate: [T, Hv V]. b, a: [T, Hv].
            z, filters, ring: as `conv`, over the qkv channels; filters None for no convolution.
                With `parts.generator`, the filters' z is generator(silu(z)).
            state: [slots, Hv, K, V] float32, read unless a sequence starts at 0, then written.

        Returns:
            [T, Hv V].
        """
        if filters is not None:
            assert ring is not None
            if parts.generator is not None:
                assert z is not None
                z = self.linear(F.silu(z), parts.generator)
            qkv = self.conv(qkv, z, filters, ring, batch)
        return reference_recurrent.delta_rule(parts, qkv, gate, b, a, state, batch)

    def ssd(
        self,
        parts: SSDParts,
        xbc: Tensor,
        z: Tensor | None,
        filters: ConvFilter | None,
        ring: Tensor | None,
        gate: Tensor,
        dt: Tensor,
        state: Tensor,
        batch: FlatBatch,
    ) -> Tensor:
        """Convolution of x, B, C, Mamba-2's selective state space over carried state, gated norm.

        step = softplus(dt + dt_bias). Per head, S <- exp(rate * step) S + B (step x)^T;
        y = S^T C + skip x; the output is RMSNorm(y * silu(gate)) over each group's channels.

        Args:
            xbc: [T, H P + 2 G N], x then B then C. gate: [T, H P]. dt: [T, H].
            z, filters, ring: as `conv`, over the xbc channels; filters None for no convolution.
            state: [slots, H, N, P] float32, read unless a sequence starts at 0, then written.

        Returns:
            [T, H P].
        """
        if filters is not None:
            assert ring is not None
            xbc = self.conv(xbc, z, filters, ring, batch)
        return reference_recurrent.ssd(parts, xbc, gate, dt, state, batch)

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        """x * sigmoid(gate). x [T, D], gate [T, D] or [T, 1] -> [T, D]."""
        return (x * widen(gate).sigmoid()).to(x.dtype)

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Tensor,
        down: Tensor,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """Top-k mixture of SwiGLU experts.

        Args:
            x: [T, H]. router_logits: [T, E]. gate_up: [E, 2 I, H]. down: [E, H, I].
            normalize: divide the chosen probabilities by their sum.
        """
        return moe(x, router_logits, gate_up, down, top_k, normalize)
