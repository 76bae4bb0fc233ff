"""Ops for CPUs that give a row the same bits whatever rows are beside it in the step.

Torch picks a matrix product by the number of rows, ends a vector loop with scalar code, and splits
long sums over threads, and each of these changes the last bits of a row with its neighbours. Here
a product sees blocks of as many rows as fill its vectors, one row a lane; what is neither a product
nor exactly rounded (additions, multiplications, divisions and roots are) runs on one row at a time,
in tensors of its own. It costs speed. Native kernels, where there are any, promise the same without
this and go first.

What holds within one process: another number of threads, library or processor gives other bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference_attention, reference_conv, reference_sampling
from .cpu import CpuOps
from .native_build import load
from .native_ops import NativeOps
from .reference_rows import widen
from .weights import PackedLinear

if TYPE_CHECKING:
    from collections.abc import Sequence
    from ctypes import CDLL

    from .batch import FlatBatch
    from .filters import ConvFilter
    from .ops import Ops

ROWS = 16
"""Rows of the one product: the lanes of one AVX-512 vector, of two of AVX2, of four of NEON."""

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def fixed_cpu_ops() -> Ops:
    """The fastest of these that this CPU can run."""
    library = load()
    return FixedCpuOps() if library is None else FixedNativeOps(library)


class FixedCpuOps(CpuOps):
    """See the module."""

    name = "cpu, deterministic"

    def __init__(self) -> None:
        self._products: dict[tuple[object, ...], Product] = {}

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        """See `Ops.pack_linear`.

        Raises:
            RuntimeError: this machine has no product that rounds every row alike.
        """
        weight = weight.contiguous()
        self._product_for(weight)
        return PackedLinear(weight, bias, weight.shape[1], weight.shape[0])

    def linear(self, x: Tensor, packed: PackedLinear) -> Tensor:
        """See `Ops.linear`."""
        return self._product(x, packed.weight, packed.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See `Ops.rms_norm`."""
        wide = widen(x)
        mean = _by_row(lambda row: row.mean(-1, keepdim=True), wide.square())
        return (wide * (1 / (mean + eps).sqrt()) * weight).to(x.dtype)

    def conv(
        self, x: Tensor, z: Tensor | None, filters: ConvFilter, ring: Tensor, batch: FlatBatch
    ) -> Tensor:
        """See `Ops.conv`."""
        return reference_conv.conv(x, z, filters, ring, batch, self._apply_filter)

    def attention(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        batch: FlatBatch,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """See `Ops.attention`. Each row by itself, over the keys that it sees and no others."""
        assert batch.spans is not None, "these ops need the host copy of the batch's spans"
        out = torch.zeros_like(q)
        size, row = k_pages.shape[2], 0
        for seq, (start, rows) in enumerate(batch.spans):
            table = batch.pages[seq : seq + 1, : -(-(start + rows) // size)]
            k, v = (reference_attention.gather(p, table, start + rows) for p in (k_pages, v_pages))
            for end in range(start + 1, start + rows + 1):
                seen = slice(0 if window is None else max(0, end - window), end)
                attended = F.scaled_dot_product_attention(
                    q[row].clone().view(1, k.shape[1], -1, q.shape[2]),
                    k[:, :, seen].clone(memory_format=torch.contiguous_format),
                    v[:, :, seen].clone(memory_format=torch.contiguous_format),
                    scale=scale,
                )
                out[row] = attended.view(q.shape[1:])
                row += 1
        return out.flatten(1)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See `Ops.silu_mul`."""
        gate, up = gate_up.chunk(2, dim=1)
        return (_by_row(F.silu, widen(gate)) * up).to(gate_up.dtype)

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        """See `Ops.sigmoid_mul`."""
        return (x * _by_row(torch.sigmoid, widen(gate))).to(x.dtype)

    def moe(
        self,
        x: Tensor,
        router_logits: Tensor,
        gate_up: Tensor,
        down: Tensor,
        top_k: int,
        normalize: bool,
    ) -> Tensor:
        """See `Ops.moe`. A row's experts are added in ascending order."""
        chances = _by_row(lambda row: row.softmax(-1), widen(router_logits))
        weights, experts = chances.topk(top_k, dim=-1)
        if normalize:
            weights = weights / _added(weights.unbind(1))[:, None]
        out = torch.zeros_like(widen(x))
        for expert in experts.unique().tolist():
            row, choice = (experts == expert).nonzero(as_tuple=True)
            hidden = self.silu_mul(self._product(x[row], gate_up[expert]))
            y = self._product(hidden, down[expert])
            out.index_add_(0, row, y * weights[row, choice, None])
        return out.to(x.dtype)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        u: Tensor,
    ) -> Tensor:
        """See `Ops.sample`."""
        columns = (logits, temperature, top_k, top_p, min_p, u)
        rows = [
            reference_sampling.sample(*(c[i : i + 1].clone() for c in columns))
            for i in range(len(logits))
        ]
        return torch.cat(rows) if rows else logits.new_empty(0, dtype=torch.int64)

    def _apply_filter(self, window: Tensor, z: Tensor | None, filters: ConvFilter) -> Tensor:
        """See `reference_conv.apply_filter`. Taps are added from the current one on."""
        dtype = torch.promote_types(window.dtype, torch.float32)
        f = filters.static.to(dtype)[None]
        if filters.kind != "static":
            assert z is not None
            code = z.to(dtype)
            f = f + reference_conv.dynamic_taps(code, filters, self._product)
        y = _added([f[:, tap] * window[:, tap] for tap in range(filters.width)])
        if filters.bias is not None:
            y = y + filters.bias
        y = y * filters.scale
        return _by_row(F.silu, y) if filters.activation == "silu" else y

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [T, in] times weight [out, in], plus bias -> [T, out], in blocks of `ROWS` rows."""
        product = self._product_for(weight)
        blocks = -(-len(x) // ROWS)
        padded = x.new_zeros((blocks, ROWS, x.shape[1]))
        padded.view(-1, x.shape[1])[: len(x)] = x
        out = x.new_empty((blocks, ROWS, len(weight)))
        for block, into in zip(padded, out, strict=True):
            into.copy_(product(block, weight, bias))
        return out.view(-1, len(weight))[: len(x)]

    def _product_for(self, weight: Tensor) -> Product:
        key = (weight.shape, weight.stride(), weight.dtype)
        if key not in self._products:
            self._products[key] = _steady_product(weight)
        return self._products[key]


class FixedNativeOps(NativeOps, FixedCpuOps):
    """Native kernels where they cover the model, and the ops above where they do not.

    What `NativeOps` hands on goes to `FixedCpuOps`, the next in line.
    """

    name = "cpu-native, deterministic"

    def __init__(self, library: CDLL) -> None:
        NativeOps.__init__(self, library)
        FixedCpuOps.__init__(self)


def _rows_in_lanes(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(weight, x.t()).t()
    return torch.addmm(bias[:, None], weight, x.t()).t()


def _steady_product(weight: Tensor) -> Product:
    """A call that gives every place of a block the same bits, tried on this machine.

    Raises:
        RuntimeError: there is none.
    """
    row = torch.arange(weight.shape[1]).add(1).sin().to(weight.dtype)
    block = row.repeat(ROWS, 1)
    for product in (_rows_in_lanes, F.linear):
        y = product(block, weight, None)
        if torch.equal(y, y[:1].expand_as(y)):
            return product
    shape = " x ".join(map(str, weight.shape))
    raise RuntimeError(
        f"deterministic: on this machine, {weight.dtype} products with a {shape} matrix differ by "
        "a row's place"
    )


def _by_row(op: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`op` of each row of x [T, ...] alone, in memory that begins as all others do."""
    if not len(x):
        return op(x)
    return torch.stack([op(row.clone()) for row in x])


def _added(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, from the first to the last."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
