"""Captured kernels must give, bit for bit and time after time, what they give outside a graph."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from convserve.kernels import triton_launch
from convserve.kernels.triton_ops import TritonOps
from triton_cases import (
    DEVICE,
    make_filter,
    make_layout,
    make_pages,
    make_ring,
    nan_bits,
    normal,
)

if TYPE_CHECKING:
    from convserve.kernels import FlatBatch
    from torch import Tensor

TRITON = TritonOps()
HEADS, DIM, WIDTH = 4, 64, 256


@pytest.mark.skipif(DEVICE.type != "cuda", reason="captures a CUDA graph")
@pytest.mark.parametrize("kind", ["static", "lowrank", "headwise"])
@pytest.mark.parametrize("rows", [1, 3], ids=["decode", "verify"])
def test_a_captured_step_repeats_the_eager_one(kind: str, rows: int) -> None:
    torch.manual_seed(1)
    dtype = torch.bfloat16
    layout = make_layout([(i * 40, rows) for i in range(9)], ring_len=8)
    count = 9 * rows
    qkv_filter, z_width = make_filter(
        kind, 4, [(i * WIDTH, (i + 1) * WIDTH) for i in range(3)], head_size=16, dtype=dtype
    )
    out_filter, out_width = make_filter(kind, 4, [(0, WIDTH)], head_size=16, dtype=dtype)
    x, z = normal(count, 3 * WIDTH, dtype=dtype), normal(count, max(z_width, 1), dtype=dtype)
    out_z, residual = (
        normal(count, max(out_width, 1), dtype=dtype),
        normal(count, WIDTH, dtype=dtype),
    )
    rope, weight = normal(count, DIM), normal(WIDTH, dtype=dtype)
    state = [
        make_ring(layout, 4, 3 * WIDTH, dtype),
        make_ring(layout, 4, WIDTH, dtype),
        make_pages(layout, HEADS, DIM, dtype),
        make_pages(layout, HEADS, DIM, dtype),
    ]

    def step(state: list[Tensor], batch: FlatBatch) -> tuple[Tensor, Tensor]:
        ring, out_ring, k, v = state
        q = TRITON.qkv_rope_write(x, z, qkv_filter, ring, None, rope, k, v, batch)
        mixed = TRITON.attention(q, k, v, batch, DIM**-0.5)
        return TRITON.conv_add_rms_norm(
            mixed, out_z, out_filter, out_ring, residual, weight, 1e-5, batch
        )

    eager_state = [t.clone() for t in state]
    eager = step(eager_state, layout.batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(state, layout.batch)
    for _ in range(3):
        graph.replay()
        for got, truth in zip((*captured, *state), (*eager, *eager_state), strict=True):
            assert torch.equal(nan_bits(got), nan_bits(truth))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="overlaps kernels on a GPU")
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_kernels_that_start_early_read_nothing_early(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read before the kernel before has written would be a wrong token once in a while."""
    torch.manual_seed(2)
    hidden, inner, dtype = 2048, 4096, torch.bfloat16
    shapes = ((2 * inner, hidden), (hidden, inner), (hidden, hidden))
    gate_up, down, o = (
        TRITON.pack_linear(normal(*shape, dtype=dtype) / shape[1] ** 0.5, None) for shape in shapes
    )
    table, norm = normal(500, hidden, dtype=dtype), normal(hidden, dtype=dtype)
    ids = torch.randint(0, 500, (rows,), device=DEVICE)

    def run() -> list[Tensor]:
        torch.cuda.synchronize()
        results = []
        residual = TRITON.embed(ids, table)
        x = TRITON.rms_norm(residual, norm, 1e-5)
        for _ in range(60):
            x, residual = TRITON.add_rms_norm(TRITON.linear(x, o), residual, norm, 1e-5)
            hidden = TRITON.silu_mul(TRITON.linear(x, gate_up))
            x, residual = TRITON.add_rms_norm(TRITON.linear(hidden, down), residual, norm, 1e-5)
            results.append(x)
        return [*results, TRITON.argmax(x)]

    overlapped = [run() for _ in range(3)]
    monkeypatch.setattr(triton_launch, "can_overlap", lambda _device: False)
    apart = run()
    for results in overlapped:
        for got, truth in zip(results, apart, strict=True):
            assert torch.equal(got, truth)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="overlaps kernels on a GPU")
def test_keys_read_early_are_those_of_earlier_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention fetches old keys before this step's are written: it must meet those all the same,
    and in the next step find them where it looks early.
    """
    torch.manual_seed(3)
    dtype, layers, hidden = torch.bfloat16, 3, HEADS * DIM
    weights = [
        TRITON.pack_linear(normal(3 * hidden, hidden, dtype=dtype) / hidden**0.5, None)
        for _ in range(layers)
    ]
    first, rope = normal(9, hidden, dtype=dtype), normal(9, DIM)

    def run() -> list[Tensor]:
        caches = [[torch.zeros(50, HEADS, 16, DIM, dtype=dtype, device=DEVICE) for _ in "kv"]
                  for _ in weights]  # fmt: skip
        results = []
        for step in range(40):
            batch = make_layout([(step, 1)] * 9).batch
            pages = (torch.arange(9)[:, None] * 4 + torch.arange(1, 5)).int().to(DEVICE)
            rows = pages[:, step // 16].long() * 16 + step % 16
            batch = replace(batch, pages=pages, kv_rows=rows)
            x = first
            for weight, (k, v) in zip(weights, caches, strict=True):
                qkv = TRITON.linear(x, weight)
                q = TRITON.qkv_rope_write(qkv, None, None, None, None, rope, k, v, batch)
                x = TRITON.attention(q, k, v, batch, DIM**-0.5)
            results.append(x)
        return results

    overlapped = run()
    monkeypatch.setattr(triton_launch, "can_overlap", lambda _device: False)
    for got, truth in zip(overlapped, run(), strict=True):
        assert torch.equal(got, truth)
