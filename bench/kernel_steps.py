"""What bench/kernels.py measures beyond single ops: the linear layers of a step in sequence, whole
decode steps, sampling, and mixtures of experts.

The shape is that of `kernel_cases`: 24 layers, every layer with weights of its own. "apart" is the
same without programmatic dependent launch.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from convserve.kernels import (
    AttentionParts,
    ConvFilter,
    Convolved,
    FlatBatch,
    MLPParts,
    Ops,
    PackedLinear,
    Stream,
    triton_launch,
    triton_moe,
)
from convserve.kernels.triton_linear import linear_parts, silu_linear
from convserve.kernels.triton_mlp import silu_mul
from convserve.kernels.triton_norm import add_rms_norm
from convserve.kernels.triton_ops import TritonOps
from convserve.kernels.tuning import ExpertTile, LinearTile
from kernel_cases import DIM, HEADS, INNER, RANK, VOCAB, WIDTH, Calls, H, make_batch
from kernel_cases import normal as unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS = 24
OPS = TritonOps()


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return unit(*shape) * scale


def packed(outputs: int, depth: int) -> PackedLinear:
    return PackedLinear(normal(outputs, depth, scale=depth**-0.5), None, depth, outputs)


def apart(call: Callable[[], object]) -> Callable[[], object]:
    """The call with kernels launched one after the other."""

    def run() -> None:
        with patch.object(triton_launch, "can_overlap", lambda _device: False):
            call()

    return run


@dataclass
class Model:
    """Random weights of every layer."""

    attention: list[AttentionParts]
    mlp: list[MLPParts]
    norms: list[torch.Tensor]
    table: torch.Tensor
    head: PackedLinear


def convolved(kind: str, widths: tuple[int, ...]) -> tuple[Convolved, int]:
    """A convolution after a linear layer whose output is that wide, in parts, and z's columns."""
    if kind == "none":
        return Convolved(None, slice(0, 0)), 0
    streams, at = [], 0
    for i, width in enumerate(widths):
        streams.append(Stream(at, at + width, i * RANK))
        at += width
    static = torch.randn(WIDTH, at, device="cuda") * 0.1
    static[0] += 1
    filters = ConvFilter(
        "lowrank", WIDTH, tuple(streams), static, normal(RANK, WIDTH, at, scale=0.1)
    )
    z = len(widths) * RANK
    return Convolved(filters, slice(at, at + z)), z


def make_model(kind: str) -> Model:
    """`kind`: "none", "lowrank" (q, k, v convolved) or "all" (all seven)."""
    attention, mlp = [], []
    rest = kind if kind == "all" else "none"
    for _ in range(LAYERS):
        qkv_conv, z = convolved(kind, (H, H, H))
        o_conv, o_z = convolved(rest, (H,))
        block = AttentionParts(
            packed(3 * H + z, H), qkv_conv, packed(H + o_z, H), o_conv, False, HEADS, HEADS, DIM,
            None, None,
        )  # fmt: skip
        attention.append(block)
        inner_conv, inner_z = convolved(rest, (INNER, INNER))
        down_conv, down_z = convolved(rest, (H,))
        gated = packed(2 * INNER + inner_z, H)
        mlp.append(MLPParts(gated, inner_conv, packed(H + down_z, INNER), down_conv, False, INNER))
    norms = [normal(H) for _ in range(2 * LAYERS + 1)]
    return Model(attention, mlp, norms, normal(VOCAB, H), packed(VOCAB, H))


def linear_chain(tune: bool) -> Iterator[dict[str, Any]]:
    """The linear layers of a step in sequence, head included, beside cuBLAS."""
    weights = [
        packed(o, d)
        for _ in range(LAYERS)
        for o, d in ((3 * H + 3 * RANK, H), (H, H), (2 * INNER, H), (H, INNER))
    ]
    weights.append(packed(VOCAB, H))
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):

        def make(rows: int = rows) -> Calls:
            inputs = {H: normal(rows, H), INNER: normal(rows, INNER)}

            def ours() -> None:
                for w in weights:
                    OPS.linear(inputs[w.in_features], w)

            def cublas() -> None:
                for w in weights:
                    F.linear(inputs[w.in_features], w.weight)

            calls: Calls = {"ours": ours, "cuBLAS": cublas}
            if rows <= 8:
                calls["apart"] = apart(ours)
            return calls

        size = sum(w.out_features * w.in_features for w in weights) * 2
        yield {"name": f"linears rows {rows}", "bytes": size, "make": make, "set_bytes": 1 << 28}


def linear_pairs(tune: bool) -> Iterator[dict[str, Any]]:
    """Linear layers with what follows them: SiLU product, or residual and norm; beside cuBLAS."""
    pairs = {"gate_up, SiLU": (2 * INNER, H), "o, norm": (H, H), "down, norm": (H, INNER)}
    for rows in (8, 16, 32, 64, 128):
        for name, (outputs, depth) in pairs.items():

            def make(rows: int = rows, outputs: int = outputs, depth: int = depth) -> Calls:
                x, layer = normal(rows, depth), packed(outputs, depth)
                residual, weight = normal(rows, H), normal(H)
                gated = outputs != H

                def cublas() -> object:
                    y = F.linear(x, layer.weight)
                    return silu_mul(y) if gated else add_rms_norm(y, residual, weight, 1e-5)

                def ours(tile: LinearTile | None = None) -> object:
                    if gated:
                        if tile is None:
                            return OPS.silu_linear(x, layer)
                        return silu_linear(x, layer.weight, None, tile)
                    if tile is None:
                        return OPS.linear_add_rms_norm(x, layer, residual, weight, 1e-5)
                    sums = linear_parts(x, layer.weight, None, tile)
                    assert sums is not None
                    return add_rms_norm(sums, residual, weight, 1e-5)

                calls: Calls = {"ours": ours, "cuBLAS": cublas}
                if tune:
                    m = max(8, rows)
                    for n, k, w, s, early, parts in (
                        (64, 128, 4, 3, 0, 1), (64, 128, 4, 3, 4, 1), (64, 64, 4, 4, 0, 1),
                        (64, 64, 4, 6, 0, 1), (128, 64, 8, 5, 0, 1), (64, 128, 4, 4, 0, 4),
                        (64, 128, 4, 3, 1, 4), (64, 64, 4, 6, 0, 4), (64, 64, 4, 6, 0, 8),
                    ):  # fmt: skip
                        if (parts == 1) == gated:
                            tile = LinearTile(m, n, k, w, s, early=early, parts=parts)
                            calls[f"{n}k{k}w{w}s{s}e{early}/{parts}"] = lambda t=tile: ours(t)
                return calls

            yield {"name": f"{name} {rows}", "bytes": outputs * depth * 2, "make": make}


def whole_step(
    model: Model, batch: FlatBatch, caches: list[tuple[torch.Tensor, torch.Tensor]]
) -> Callable[[], torch.Tensor]:
    """Token ids to token ids, for sequences of one row each; layers take the caches in turn."""
    seqs = len(batch.starts)
    ids = torch.randint(0, VOCAB, (seqs,), device="cuda")
    rope = torch.randn(seqs, DIM, device="cuda")
    attention, mlp = model.attention[0], model.mlp[0]
    sites = {
        "qkv": attention.qkv_conv, "o": attention.o_conv, "gate_up": mlp.gate_up_conv,
        "down": mlp.down_conv,
    }  # fmt: skip
    rings = [
        {
            name: normal(seqs + 1, WIDTH, site.filters.channels)
            for name, site in sites.items() if site.filters is not None
        }
        for _ in range(LAYERS)
    ]  # fmt: skip

    def step() -> torch.Tensor:
        residual = OPS.embed(ids, model.table)
        x = OPS.rms_norm(residual, model.norms[0], 1e-5)
        for i in range(LAYERS):
            k, v = caches[i % len(caches)]
            x, residual = OPS.attention_block(
                model.attention[i], x, residual, model.norms[2 * i + 1], 1e-5, rope, k, v,
                rings[i], batch,
            )  # fmt: skip
            x, residual = OPS.mlp_block(
                model.mlp[i], x, residual, model.norms[2 * i + 2], 1e-5, rings[i], batch
            )
        return OPS.argmax(OPS.linear(x, model.head))

    return step


def decode_steps(tune: bool) -> Iterator[dict[str, Any]]:
    """Token ids to token ids at context 1024; KV pages rotate over enough buffers to be cold."""
    context = 1024
    for kind in ("none", "lowrank", "all"):
        model = make_model(kind)
        for seqs in (1, 8, 16, 32, 64, 128):
            batch = make_batch(seqs, 1, context - 1)
            size = seqs * context * HEADS * DIM * 4
            pages = int(batch.pages.max()) + 1
            buffers = max(1, min(LAYERS, 220_000_000 // size))
            caches = [
                (normal(pages, HEADS, 16, DIM), normal(pages, HEADS, 16, DIM))
                for _ in range(buffers)
            ]

            def make(
                batch: FlatBatch = batch, caches: Any = caches, model: Model = model,
                kind: str = kind,
            ) -> Calls:  # fmt: skip
                step = whole_step(model, batch, caches)
                calls: Calls = {kind: step}
                if kind == "none":
                    calls["apart"] = apart(step)
                return calls

            weights = sum(
                p.out_features * p.in_features * 2
                for parts in (*model.attention, *model.mlp)
                for p in (
                    (parts.qkv, parts.o) if isinstance(parts, AttentionParts)
                    else (parts.gate_up, parts.down)
                )
            ) + VOCAB * H * 2  # fmt: skip
            yield {"name": f"step {kind} batch {seqs}", "bytes": weights + LAYERS * size,
                   "make": make}  # fmt: skip
            del caches
            torch.cuda.empty_cache()


def choices(tune: bool) -> Iterator[dict[str, Any]]:
    """From logits to ids, and from ids to rows."""
    for rows in (1, 8, 64, 256):

        def make(rows: int = rows) -> Calls:
            logits, table = normal(rows, VOCAB), normal(VOCAB, H)
            ids = torch.randint(0, VOCAB, (rows,), device="cuda")
            ones = torch.ones(rows, device="cuda")
            u = torch.rand(rows, dtype=torch.float64, device="cuda")
            plain = (ones, ones.int() * 0, ones, ones * 0, u)
            top_p = (ones, ones.int() * 0, ones * 0.9, ones * 0, u)
            top_k = (ones, ones.int() * 50, ones, ones * 0, u)
            return {
                "argmax": lambda: OPS.argmax(logits), "torch max": lambda: logits.max(-1),
                "embed": lambda: OPS.embed(ids, table),
                "torch embed": lambda: F.embedding(ids, table),
                "draw": lambda: OPS.sample(logits, *plain),
                "draw top-p": lambda: OPS.sample(logits, *top_p),
                "draw top-k": lambda: OPS.sample(logits, *top_k),
                "torch draw": lambda: Ops().sample(logits, *top_p),
            }  # fmt: skip

        yield {"name": f"rows {rows}", "bytes": rows * VOCAB * 2, "make": make,
               "set_bytes": VOCAB * H * 2}  # fmt: skip


def experts(tune: bool) -> Iterator[dict[str, Any]]:
    """64 SwiGLU experts of 1024, 8 a row; the floor reads every expert that rows meet once."""
    count, inner, top = 64, 1024, 8
    gate_up = [normal(count, 2 * inner, H, scale=H**-0.5) for _ in range(2)]
    down = [normal(count, H, inner, scale=inner**-0.5) for _ in range(2)]
    sets = itertools.cycle(zip(gate_up, down, strict=True))
    for rows in (1, 8, 64, 256, 4096):

        def make(rows: int = rows) -> Calls:
            x, logits = normal(rows, H), normal(rows, count)
            weights = next(sets)
            tiles: dict[str, ExpertTile | None] = {"ours": None}
            if tune:
                tiles = {f"{m}x{n}k{k}w{w}s{s}": ExpertTile(m, n, k, w, s) for m, n, k, w, s in (
                    (16, 64, 128, 4, 3), (16, 32, 256, 4, 3), (16, 32, 128, 4, 4),
                    (64, 128, 64, 8, 3), (64, 64, 64, 4, 3), (128, 128, 64, 8, 3))
                    if (m == 16) == (rows <= 64)}  # fmt: skip
            return {
                name: lambda t=t: triton_moe.moe(x, logits, *weights, top, True, t)
                for name, t in tiles.items()
            }

        met = count * (1 - (1 - top / count) ** rows)
        yield {"name": f"rows {rows}", "bytes": int(met * 3 * inner * H * 2), "make": make,
               "flops": rows * top * 6 * inner * H, "set_bytes": 120_000_000}  # fmt: skip


SECTIONS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "chain": linear_chain, "pairs": linear_pairs, "step": decode_steps, "choices": choices,
    "experts": experts,
}  # fmt: skip
