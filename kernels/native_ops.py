"""Ops for CPUs in native code: bfloat16 kernels called through ctypes on the tensors' own memory.

What the kernels do not cover (other dtypes, odd widths, unusual layouts) goes to the torch ops
above them. The one place that knows the kernels' C signatures.
"""

from __future__ import annotations

import ctypes
from ctypes import byref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import native_build
from .cpu import CpuOps
from .native_blocks import NativeBlocks
from .native_calls import (
    NORM_MODES,
    PANEL_PAIR,
    ConvRecord,
    PanelLinear,
    are_pages,
    attends,
    conv_record,
    convolves,
    declare,
    is_norm_weight,
    is_qk_norm,
    threads,
)
from .ops import Ops, PackedLinear, QKNorm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .batch import FlatBatch
    from .blocks import AttentionParts, MLPParts
    from .filters import ConvFilter


def cpu_ops() -> Ops:
    """The fastest ops this CPU can run: native where they can be built, torch otherwise."""
    library = native_build.load()
    return CpuOps() if library is None else NativeOps(library)


class NativeOps(CpuOps):
    """Native kernels for bfloat16 on the CPU; float32 and the rest as `CpuOps`."""

    name = "cpu-native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._lib = library
        declare(library)
        self._blocks = NativeBlocks(library)
        self._convs: dict[int, tuple[ConvRecord, object]] = {}

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `Ops.pack_linear`. One copy serves every number of rows; keep no other."""
        outputs, inputs = weight.shape
        if weight.dtype != torch.bfloat16 or inputs % 2 or weight.stride(1) != 1:
            return super().pack_linear(weight, bias)
        padded = -(-outputs // PANEL_PAIR) * PANEL_PAIR
        panels = torch.empty(padded * inputs, dtype=torch.bfloat16)
        self._lib.convserve_pack(
            weight.data_ptr(), weight.stride(0), panels.data_ptr(), inputs, outputs, threads()
        )
        wide = None
        if bias is not None:
            wide = torch.zeros(padded)
            wide[:outputs] = bias
        return PanelLinear(
            panels,
            wide,
            inputs,
            outputs,
            panels.data_ptr(),
            None if wide is None else wide.data_ptr(),
        )

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See `Ops.linear`. A row's result does not depend on the other rows."""
        if not isinstance(packed, PanelLinear):
            return super().linear(x, packed)
        rows, outputs = len(x), packed.out_features
        y = torch.empty((rows, outputs), dtype=torch.bfloat16)
        self._lib.convserve_linear(
            x.data_ptr(),
            x.stride(0),
            packed.address,
            packed.bias_address,
            y.data_ptr(),
            rows,
            packed.in_features,
            outputs,
            threads(),
        )
        return y

    def pack_tied(self, table: Tensor) -> tuple[Tensor | PackedLinear, PackedLinear]:
        """See `Ops.pack_tied`. One copy serves both."""
        packed = self.pack_linear(table, None)
        return packed if isinstance(packed, PanelLinear) else table, packed

    def embed(self, token_ids: Tensor, table: Tensor | PackedLinear) -> Tensor:
        """See `Ops.embed`. The table may be a packed linear: tied weights are then kept once."""
        if not isinstance(table, PanelLinear):
            return super().embed(
                token_ids, table.weight if isinstance(table, PackedLinear) else table
            )
        y = torch.empty((len(token_ids), table.in_features), dtype=torch.bfloat16)
        self._lib.convserve_embed(
            table.address, token_ids.data_ptr(), y.data_ptr(), len(y), table.in_features
        )
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        if x.dtype != torch.bfloat16 or not is_norm_weight(weight):
            return super().rms_norm(x, weight, eps)
        x = x.contiguous()
        y = torch.empty_like(x)
        width = x.shape[-1]
        self._lib.convserve_rms_norm(
            x.data_ptr(),
            width,
            None,
            None,
            weight.data_ptr(),
            weight.dtype == torch.float32,
            eps,
            y.data_ptr(),
            x.numel() // width,
            width,
            threads(),
        )
        return y

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.add_rms_norm`."""
        if (
            x.dtype != torch.bfloat16
            or residual.dtype != torch.bfloat16
            or not is_norm_weight(weight)
            or x.stride(1) != 1
            or not residual.is_contiguous()
        ):
            return super().add_rms_norm(x, residual, weight, eps)
        y, total = torch.empty_like(residual), torch.empty_like(residual)
        self._lib.convserve_rms_norm(
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr(),
            total.data_ptr(),
            weight.data_ptr(),
            weight.dtype == torch.float32,
            eps,
            y.data_ptr(),
            x.shape[0],
            x.shape[1],
            threads(),
        )
        return y, total

    def conv(
        self, x: Tensor, z: Tensor | None, filters: ConvFilter, ring: Tensor, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.conv`."""
        if (
            x.dtype != torch.bfloat16
            or x.stride(1) != 1
            or (z is not None and (z.dtype != torch.bfloat16 or z.stride(1) != 1))
            or not convolves(filters, ring)
        ):
            return super().conv(x, z, filters, ring, batch)
        covered = filters.channels == x.shape[1]
        y = (
            torch.empty(x.shape, dtype=x.dtype)
            if covered
            else x.clone(memory_format=torch.contiguous_format)
        )
        args = self._conv_args(filters)
        args.x, args.x_stride = x.data_ptr(), x.stride(0)
        if z is not None:
            args.z, args.z_stride = z.data_ptr(), z.stride(0)
        args.y, args.y_stride = y.data_ptr(), y.stride(0)
        args.ring, args.ring_stride = ring.data_ptr(), ring.stride(1)
        args.starts, args.offsets = batch.starts.data_ptr(), batch.offsets.data_ptr()
        args.slots, args.ring_rows = batch.slots.data_ptr(), batch.ring_rows.data_ptr()
        args.seqs, args.rows, args.ring_len = len(batch.starts), len(x), batch.ring_len
        self._lib.convserve_conv(byref(args), threads())
        return y

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
        """See `Ops.qkv_rope_write`."""
        if (
            qkv.dtype != torch.bfloat16
            or qkv.stride(1) != 1
            or not are_pages(k_pages, v_pages)
            or (norm is not None and not is_qk_norm(norm, filters))
        ):
            return super().qkv_rope_write(
                qkv, z, filters, ring, norm, rope, k_pages, v_pages, batch
            )
        if filters is not None:
            assert ring is not None
            qkv = self.conv(qkv, z, filters, ring, batch)
        _, kv_heads, page_size, head = k_pages.shape
        rows = len(qkv)
        q_heads = qkv.shape[1] // head - 2 * kv_heads
        q = torch.empty((rows, q_heads, head), dtype=torch.bfloat16)
        mode, q_weight, k_weight, wide, eps = 0, None, None, 0, 0.0
        if norm is not None:
            mode = NORM_MODES[norm.mode]
            q_weight, k_weight = norm.q.data_ptr(), norm.k.data_ptr()
            wide, eps = norm.q.dtype == torch.float32, norm.eps
        self._lib.convserve_rope_write(
            qkv.data_ptr(),
            qkv.stride(0),
            q_heads,
            kv_heads,
            head,
            rope.data_ptr(),
            rope.stride(0),
            rope.shape[1],
            mode,
            q_weight,
            k_weight,
            wide,
            eps,
            q.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            page_size,
            *k_pages.stride()[:3],
            batch.kv_rows.data_ptr(),
            rows,
            threads(),
        )
        return q

    def attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: FlatBatch,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """See `Ops.attention`. A row's result depends on its own sequence and position alone."""
        rows, q_heads, head = q.shape
        kv_heads, page_size = k_pages.shape[1:3]
        if (
            q.dtype != torch.bfloat16
            or not attends(q_heads, kv_heads, head)
            or not q.is_contiguous()
            or not are_pages(k_pages, v_pages)
        ):
            return super().attention(q, k_pages, v_pages, batch, scale, window)
        out = torch.empty((rows, q_heads * head), dtype=torch.bfloat16)
        failed = self._lib.convserve_attention(
            q.data_ptr(),
            k_pages.data_ptr(),
            v_pages.data_ptr(),
            out.data_ptr(),
            batch.starts.data_ptr(),
            batch.offsets.data_ptr(),
            len(batch.starts),
            batch.pages.data_ptr(),
            batch.pages.stride(0),
            page_size,
            *k_pages.stride()[:3],
            q_heads,
            kv_heads,
            head,
            scale,
            window or 0,
            rows,
            threads(),
        )
        if failed:
            raise MemoryError(f"attention: no memory for the work list of {rows} rows")
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        if gate_up.dtype != torch.bfloat16 or gate_up.stride(1) != 1:
            return super().silu_mul(gate_up)
        rows, width = len(gate_up), gate_up.shape[1] // 2
        y = torch.empty((rows, width), dtype=torch.bfloat16)
        self._lib.convserve_silu_mul(
            gate_up.data_ptr(), gate_up.stride(0), y.data_ptr(), rows, width, threads()
        )
        return y

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
        """See `Ops.attention_block`: one call where every op of the block is native."""
        done = self._blocks.attention(
            parts, x, residual, norm, eps, rope, k_pages, v_pages, rings, batch
        )
        return done or super().attention_block(
            parts, x, residual, norm, eps, rope, k_pages, v_pages, rings, batch
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
        """See `Ops.mlp_block`: one call where every op of the block is native."""
        done = self._blocks.mlp(parts, x, residual, norm, eps, rings, batch)
        return done or super().mlp_block(parts, x, residual, norm, eps, rings, batch)

    def _conv_args(self, filters: ConvFilter) -> ConvRecord:
        known = self._convs.get(id(filters))
        if known is None:
            known = self._convs[id(filters)] = conv_record(filters)
        return known[0]
