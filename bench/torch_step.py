"""The simple baseline: a decode step of the plain 1.42 B shape in plain torch, in a CUDA graph.

cuBLAS linears, torch's SDPA over contiguous keys and values, eager norms and rotation; nothing is
fused, paged, scheduled or sampled beyond argmax. What anybody writes in an afternoon.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, LAYERS, HEADS, DIM, WIDTH, VOCAB = 2048, 24, 16, 128, 5504, 100352


class TorchStep:
    """Random weights and a full context of random keys and values."""

    def __init__(self, batch: int, context: int) -> None:
        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda") / columns**0.5

        self.layers = [
            (
                weight(3 * HIDDEN, HIDDEN),
                weight(HIDDEN, HIDDEN),
                weight(2 * WIDTH, HIDDEN),
                weight(HIDDEN, WIDTH),
            )
            for _ in range(LAYERS)
        ]
        self.table = weight(VOCAB, HIDDEN)
        self.norm = torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda")
        shape = (LAYERS, batch, HEADS, context, DIM)
        self.k = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        self.v = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        angles = context * 10000 ** (-torch.arange(0, DIM, 2, device="cuda") / DIM)
        self.cos, self.sin = (f(angles).repeat(2).bfloat16() for f in (torch.cos, torch.sin))
        self.ids = torch.zeros(batch, dtype=torch.int64, device="cuda")

    def rotate(self, x: Tensor) -> Tensor:
        """x [B, H, D] at the last position."""
        half = DIM // 2
        turned = torch.cat((-x[..., half:], x[..., :half]), -1)
        return x * self.cos + turned * self.sin

    def step(self) -> None:
        """One token for every sequence."""
        batch = len(self.ids)
        x = F.embedding(self.ids, self.table)
        for i, (qkv, out, gate_up, down) in enumerate(self.layers):
            h = F.rms_norm(x, (HIDDEN,), self.norm, 1e-5)
            q, k, v = F.linear(h, qkv).view(batch, 3, HEADS, DIM).unbind(1)
            self.k[i, :, :, -1], self.v[i, :, :, -1] = self.rotate(k), v
            mixed = F.scaled_dot_product_attention(self.rotate(q)[:, :, None], self.k[i], self.v[i])
            x = x + F.linear(mixed.reshape(batch, HIDDEN), out)
            h = F.rms_norm(x, (HIDDEN,), self.norm, 1e-5)
            gate, up = F.linear(h, gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        logits = F.linear(F.rms_norm(x, (HIDDEN,), self.norm, 1e-5), self.table)
        self.ids.copy_(logits.argmax(-1))


@torch.inference_mode()
def torch_step_ms(batch: int, context: int) -> float:
    """Median milliseconds of a replayed step."""
    model = TorchStep(batch, context)
    model.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    times: list[float] = []
    for _ in range(30):
        torch.cuda.synchronize()
        started = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)
