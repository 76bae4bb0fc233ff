"""Decoder blocks as single native calls: `struct`s of native/block.c, filled once and kept.

A block's weights and its layer's pages and rings never move, so its struct is built on first use
and found again by the identity of what it was built from. What changes from step to step is one
more struct, built when a batch is first seen.
"""

from __future__ import annotations

from ctypes import CDLL, Structure, addressof, c_float, c_long, c_void_p
from typing import TYPE_CHECKING

import torch

from .native_calls import (
    NORM_MODES,
    PanelLinear,
    are_pages,
    attends,
    conv_record,
    convolves,
    is_norm_weight,
    is_qk_norm,
    threads,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from .batch import FlatBatch
    from .blocks import AttentionParts, Convolved, MLPParts


class _Linear(Structure):
    _fields_ = (("w", c_void_p), ("bias", c_void_p), ("inputs", c_long), ("outputs", c_long))


class _Convolved(Structure):
    _fields_ = (
        ("conv", c_void_p),
        ("width", c_long),
        ("z", c_long),
        ("ring", c_void_p),
        ("ring_stride", c_long),
    )


class _Step(Structure):
    _fields_ = (
        *((n, c_void_p) for n in ("starts", "offsets", "slots", "pages", "kv_rows", "ring_rows")),
        *((n, c_long) for n in ("seqs", "rows", "pages_stride", "ring_len")),
        ("rope", c_void_p),
        *((n, c_long) for n in ("rope_stride", "rot", "threads")),
    )


class _Attention(Structure):
    _fields_ = (
        ("qkv", _Linear),
        ("o", _Linear),
        ("qkv_conv", _Convolved),
        ("o_conv", _Convolved),
        ("o_code_from_input", c_long),
        *((n, c_long) for n in ("q_heads", "kv_heads", "head", "window")),
        *((n, c_long) for n in ("page_size", "page_stride", "head_stride", "slot_stride")),
        *((n, c_long) for n in ("norm", "norm_wide")),
        *((n, c_void_p) for n in ("q_norm", "k_norm", "k_pages", "v_pages", "next_norm")),
        ("next_norm_wide", c_long),
        *((n, c_float) for n in ("scale", "norm_eps", "next_norm_eps")),
    )


class _MLP(Structure):
    _fields_ = (
        ("gate_up", _Linear),
        ("down", _Linear),
        ("gate_up_conv", _Convolved),
        ("down_conv", _Convolved),
        ("down_code_from_input", c_long),
        ("width", c_long),
        ("next_norm", c_void_p),
        ("next_norm_wide", c_long),
        ("next_norm_eps", c_float),
    )


class NativeBlocks:
    """Runs blocks whose every op is native; says no (None) to the others."""

    def __init__(self, library: CDLL) -> None:
        self._lib = library
        for name in ("attention", "mlp"):
            function = getattr(library, f"convserve_{name}_block")
            function.argtypes = (c_void_p,) * 6
            function.restype = c_long
        self._records: dict[int, _Kept] = {}
        self._step = _Step()
        self._step_of: tuple[FlatBatch, int] | None = None

    def attention(
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
    ) -> tuple[Tensor, Tensor] | None:
        """See `Ops.attention_block`."""
        inputs = (parts, norm, eps, k_pages, v_pages, rings)
        kept = self._records.get(id(parts))
        if kept is None or not kept.holds(inputs):
            record = _attention_record(parts, norm, eps, k_pages, v_pages, rings)
            kept = self._records[id(parts)] = _Kept(inputs, record)
        if kept.address is None or not _takes(x, residual):
            return None
        self._enter(batch, len(x))
        step = self._step
        step.rope, step.rope_stride, step.rot = rope.data_ptr(), rope.stride(0), rope.shape[1]
        return self._run(self._lib.convserve_attention_block, kept.address, x, residual)

    def mlp(
        self,
        parts: MLPParts,
        x: Tensor,
        residual: Tensor,
        norm: Tensor,
        eps: float,
        rings: Mapping[str, Tensor],
        batch: FlatBatch,
    ) -> tuple[Tensor, Tensor] | None:
        """See `Ops.mlp_block`."""
        inputs = (parts, norm, eps, rings)
        kept = self._records.get(id(parts))
        if kept is None or not kept.holds(inputs):
            record = _mlp_record(parts, norm, eps, rings)
            kept = self._records[id(parts)] = _Kept(inputs, record)
        if kept.address is None or not _takes(x, residual):
            return None
        self._enter(batch, len(x))
        return self._run(self._lib.convserve_mlp_block, kept.address, x, residual)

    def _run(
        self, function: Callable[..., int], block: int, x: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, total = torch.empty_like(residual), torch.empty_like(residual)
        failed = function(
            block,
            addressof(self._step),
            x.data_ptr(),
            residual.data_ptr(),
            y.data_ptr(),
            total.data_ptr(),
        )
        if failed:
            raise MemoryError(f"no memory for the intermediate rows of a step of {len(x)} rows")
        return y, total

    def _enter(self, batch: FlatBatch, rows: int) -> None:
        if self._step_of is not None and self._step_of[0] is batch and self._step_of[1] == rows:
            return
        step = self._step
        for name in ("starts", "offsets", "slots", "pages", "kv_rows", "ring_rows"):
            setattr(step, name, getattr(batch, name).data_ptr())
        step.seqs, step.rows, step.ring_len = len(batch.starts), rows, batch.ring_len
        step.pages_stride, step.threads = batch.pages.stride(0), threads()
        self._step_of = (batch, rows)


class _Kept:
    """A block's struct with everything it points into, and what it was built from."""

    def __init__(self, inputs: tuple[object, ...], record: tuple[Structure, object] | None) -> None:
        self._inputs = inputs
        self._record = record
        self.address = None if record is None else addressof(record[0])

    def holds(self, inputs: tuple[object, ...]) -> bool:
        return all(a is b for a, b in zip(self._inputs, inputs, strict=True))


def _takes(x: Tensor, residual: Tensor) -> bool:
    return (
        x.dtype == residual.dtype == torch.bfloat16
        and x.is_contiguous()
        and residual.is_contiguous()
    )


def _attention_record(
    parts: AttentionParts,
    norm: Tensor,
    eps: float,
    k_pages: Tensor,
    v_pages: Tensor,
    rings: Mapping[str, Tensor],
) -> tuple[Structure, object] | None:
    p, qk = parts, parts.qk_norm
    width = (p.q_heads + 2 * p.kv_heads) * p.head_dim
    qkv = _convolved(p.qkv_conv, width, rings.get("qkv"))
    o = _convolved(p.o_conv, p.qkv.in_features, rings.get("o"))
    if (
        qkv is None
        or o is None
        or not isinstance(p.qkv, PanelLinear)
        or not isinstance(p.o, PanelLinear)
        or not is_norm_weight(norm)
        or not are_pages(k_pages, v_pages)
        or not attends(p.q_heads, p.kv_heads, p.head_dim)
        or (qk is not None and not is_qk_norm(qk, p.qkv_conv.filters))
    ):
        return None
    record = _Attention(
        qkv=_linear(p.qkv),
        o=_linear(p.o),
        qkv_conv=qkv[0],
        o_conv=o[0],
        o_code_from_input=p.o_code_from_input,
        q_heads=p.q_heads,
        kv_heads=p.kv_heads,
        head=p.head_dim,
        window=p.window or 0,
        page_size=k_pages.shape[2],
        page_stride=k_pages.stride(0),
        head_stride=k_pages.stride(1),
        slot_stride=k_pages.stride(2),
        k_pages=k_pages.data_ptr(),
        v_pages=v_pages.data_ptr(),
        next_norm=norm.data_ptr(),
        next_norm_wide=norm.dtype == torch.float32,
        scale=p.head_dim**-0.5,
        next_norm_eps=eps,
    )
    if qk is not None:
        record.norm, record.norm_wide = NORM_MODES[qk.mode], qk.q.dtype == torch.float32
        record.q_norm, record.k_norm, record.norm_eps = qk.q.data_ptr(), qk.k.data_ptr(), qk.eps
    return record, (qkv[1], o[1], dict(rings))


def _mlp_record(
    parts: MLPParts, norm: Tensor, eps: float, rings: Mapping[str, Tensor]
) -> tuple[Structure, object] | None:
    p = parts
    gate_up = _convolved(p.gate_up_conv, 2 * p.intermediate, rings.get("gate_up"))
    down = _convolved(p.down_conv, p.gate_up.in_features, rings.get("down"))
    if (
        gate_up is None
        or down is None
        or not isinstance(p.gate_up, PanelLinear)
        or not isinstance(p.down, PanelLinear)
        or not is_norm_weight(norm)
    ):
        return None
    record = _MLP(
        gate_up=_linear(p.gate_up),
        down=_linear(p.down),
        gate_up_conv=gate_up[0],
        down_conv=down[0],
        down_code_from_input=p.down_code_from_input,
        width=p.intermediate,
        next_norm=norm.data_ptr(),
        next_norm_wide=norm.dtype == torch.float32,
        next_norm_eps=eps,
    )
    return record, (gate_up[1], down[1], dict(rings))


def _linear(packed: PanelLinear) -> _Linear:
    return _Linear(packed.address, packed.bias_address, packed.in_features, packed.out_features)


def _convolved(
    conv: Convolved, width: int, ring: Tensor | None
) -> tuple[_Convolved, object] | None:
    """The struct and what must outlive it; None if the kernels do not take this convolution."""
    if conv.filters is None:
        return _Convolved(width=width), None
    assert ring is not None
    if not convolves(conv.filters, ring):
        return None
    record, kept = conv_record(conv.filters)
    return _Convolved(
        conv=addressof(record),
        width=width,
        z=conv.z.start,
        ring=ring.data_ptr(),
        ring_stride=ring.stride(1),
    ), (record, kept)
