"""Captured kernels must give, bit for bit and time after time, what they give outside a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
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
