"""What bench/kernels.py measures of single ops: operands, launch shapes, peers, byte counts.

Shapes are those of a 1.42 B model: hidden 2048, 16 heads of 128, SwiGLU 5504, vocabulary 100,352.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import paged_peer
import torch
import torch.nn.functional as F
from convserve.kernels import ConvFilter, FlatBatch, Ops, Stream
from convserve.kernels import triton_attention as split_attention
from convserve.kernels import triton_chunk_attention as chunk_attention
from convserve.kernels.triton_conv import conv
from convserve.kernels.triton_linear import linear
from convserve.kernels.triton_mlp import conv_silu_mul, silu_mul
from convserve.kernels.triton_norm import add_rms_norm
from convserve.kernels.triton_qkv import qkv_rope_write
from convserve.kernels.tuning import ChunkTile, ConvTile, DecodeTile, LinearTile, SplitTile

H, HEADS, DIM, INNER, VOCAB = 2048, 16, 128, 5504, 100352
WIDTH, RANK = 4, 16
BF16 = torch.bfloat16
Calls = dict[str, Callable[[], object]]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def make_batch(
    seqs: int, rows: int, start: int, page: int = 16, pages_per_seq: int = 0
) -> FlatBatch:
    """`seqs` sequences of `rows` rows each, all at position `start`, in scattered pages."""
    device = torch.device("cuda")
    per_seq = max(pages_per_seq, -(-(start + rows) // page))
    pages = (torch.randperm(seqs * per_seq, device=device) + 1).view(seqs, per_seq).int()
    position = start + torch.arange(rows, device=device).repeat(seqs)
    seq = torch.arange(seqs, device=device).repeat_interleave(rows)
    slots = (torch.randperm(seqs, device=device) + 1).int()
    last = position + WIDTH >= start + rows
    ring_rows = torch.where(last, slots[seq].long() * WIDTH + position % WIDTH, -1)
    kv_rows = pages[seq, position // page].long() * page + position % page
    return FlatBatch(
        positions=position, row_seq=seq.int(),
        starts=torch.full((seqs,), start, dtype=torch.int32, device=device),
        offsets=(torch.arange(seqs + 1, device=device) * rows).int(), slots=slots, pages=pages,
        kv_rows=kv_rows, ring_rows=ring_rows, ring_len=WIDTH, max_rows=rows, max_len=start + rows,
        spans=((start, rows),) * seqs,
    )  # fmt: skip


def make_filter(
    kind: str, parts: list[tuple[int, int]], head_size: int = 16
) -> tuple[ConvFilter, int]:
    streams, z = [], 0
    for start, stop in parts:
        streams.append(Stream(start, stop, z))
        z += RANK if kind == "lowrank" else (stop - start) // head_size * WIDTH
    channels = sum(b - a for a, b in parts)
    static = torch.randn(WIDTH, channels, device="cuda")
    up = normal(RANK, WIDTH, channels) if kind == "lowrank" else None
    return ConvFilter(kind, WIDTH, tuple(streams), static, up, head_size), z  # pyright: ignore


QKV = [(0, H), (H, 2 * H), (2 * H, 3 * H)]


def conv_candidates(rows: int, tune: bool) -> dict[str, ConvTile | None]:
    if not tune:
        return {"ours": None}
    tiles: list[ConvTile] = []
    if rows <= 64:
        tiles += [ConvTile(1, 64, 1, "fma"), ConvTile(1, 32, 1, "fma")]
        tiles += [ConvTile(1, 64, 4, "sum"), ConvTile(1, 64, 2, "sum"), ConvTile(1, 32, 4, "sum")]
    if rows == 1:
        tiles += [
            ConvTile(1, 128, 2, "fma"),
            ConvTile(1, 128, 4, "fma"),
            ConvTile(1, 128, 8, "sum"),
        ]
    if 1 < rows <= 128:
        tiles += [ConvTile(2, 64, 2, "fma"), ConvTile(4, 64, 4, "fma"), ConvTile(4, 32, 2, "fma"),
                  ConvTile(8, 32, 4, "fma")]  # fmt: skip
    tiles += [ConvTile(16, 64, 4, "dot"), ConvTile(16, 32, 2, "dot"), ConvTile(16, 32, 1, "swap")]
    tiles += [ConvTile(16, 64, 2, "dot"), ConvTile(64, 32, 4, "swap")]
    if rows >= 128:
        tiles += [ConvTile(16, 32, 1, "swap", 2), ConvTile(64, 32, 4, "swap", 2)]
    return {tile_name(t): t for t in tiles}


def tile_name(t: ConvTile) -> str:
    repeat = f"r{t.repeat}" if t.repeat > 1 else ""
    stages = f"s{t.stages}" if t.stages > 1 else ""
    registers = f"g{t.registers}" if t.registers else ""
    return f"{t.generate}:{t.rows}x{t.channels}w{t.warps}{repeat}{stages}{registers}"


def decode_conv(tune: bool) -> Iterator[dict[str, Any]]:
    """q, k, v convolution alone, z given."""
    for seqs in (1, 8, 32, 64, 128, 256):
        batch = make_batch(seqs, 1, 100)
        _ = batch.ring_write, batch.tap_sources(WIDTH)

        def make(seqs: int = seqs, batch: FlatBatch = batch) -> Calls:
            filters, z_width = make_filter("lowrank", QKV)
            x, z = normal(seqs, 3 * H), normal(seqs, z_width)
            ring = normal(seqs + 1, WIDTH, 3 * H)
            calls: Calls = {
                name: (lambda t=t: conv(x, z, filters, ring, batch, tile=t))
                for name, t in conv_candidates(seqs, tune).items()
            }
            if not tune:
                calls["torch"] = lambda: Ops().conv(x, z, filters, ring, batch)
            return calls

        size = RANK * WIDTH * 3 * H * 2 + WIDTH * 3 * H * 4 + seqs * 3 * H * 2 * 6
        yield {"name": f"batch {seqs}", "bytes": size, "make": make}


def decode_qkv(tune: bool) -> Iterator[dict[str, Any]]:
    """The same with RoPE and the KV write, and without convolution."""
    for seqs in (1, 8, 32, 64, 128, 256):
        batch = make_batch(seqs, 1, 100)
        rope = torch.randn(seqs, DIM, device="cuda")
        pages = int(batch.pages.max()) + 1

        def make(
            seqs: int = seqs,
            batch: FlatBatch = batch,
            rope: torch.Tensor = rope,
            pages: int = pages,
        ) -> Calls:
            filters, z_width = make_filter("lowrank", QKV)
            x, z = normal(seqs, 3 * H), normal(seqs, z_width)
            ring = normal(seqs + 1, WIDTH, 3 * H)
            k, v = (normal(pages, HEADS, 16, DIM) for _ in range(2))
            calls: Calls = {
                name: (lambda t=t: qkv_rope_write(x, z, filters, ring, None, rope, k, v, batch, t))
                for name, t in conv_candidates(seqs, tune).items()
            }
            plain = {"no conv": None}
            if tune:
                plain = {"none1x64w1": ConvTile(1, 64, 1), "none4x64w2": ConvTile(4, 64, 2),
                         "none2x64w1": ConvTile(2, 64, 1),
                         "none8x64w4": ConvTile(8, 64, 4)}  # fmt: skip
            for name, t in plain.items():
                calls[name] = lambda t=t: qkv_rope_write(
                    x, None, None, None, None, rope, k, v, batch, t
                )
            return calls

        size = RANK * WIDTH * 3 * H * 2 + WIDTH * 3 * H * 4 + seqs * (3 * H * 2 * 6 + DIM * 4)
        yield {"name": f"batch {seqs}", "bytes": size, "make": make,
               "set_bytes": size + pages * HEADS * 16 * DIM * 4}  # fmt: skip


def prefill_tiles(kind: str) -> tuple[list[ConvTile], list[ConvTile]]:
    """Candidates of the convolution, and of the fused op."""
    if kind == "headwise":
        tiles = [ConvTile(m, 256 * w, w, "runs") for m in (4, 8, 16) for w in (1, 2)]
        fused = [ConvTile(m, 64, 1, "runs", registers=r) for m in (8, 16) for r in (128, 168)]
        return tiles, [*fused, ConvTile(8, 64, 4)]
    tiles = [
        ConvTile(m, n, n // 32, "runs", stages=3, registers=168)
        for m in (128, 256, 512, 1024)
        for n in (32, 64, 128)
    ]
    fused = [ConvTile(m, 64, 4, "runs", stages=2, registers=168) for m in (128, 256, 512)]
    swap = ConvTile(64, 32, 4, "swap")
    return [*tiles, swap], [*fused, swap]


def prefill_conv(tune: bool) -> Iterator[dict[str, Any]]:
    """q, k, v convolution of chunks, and the fused QKV op. Bytes are those of x and y: the speed
    targets leave out z, an eighth more for heads of 16."""
    shapes = ((1, 4096), (4, 4096), (1, 2048), (16, 256))
    kinds = (("lowrank", 0), ("headwise", 16), ("headwise", 128))
    for kind, head_size in kinds:
        for seqs, length in shapes:
            batch = make_batch(seqs, length, 0)
            rows = seqs * length
            rope = torch.randn(rows, DIM, device="cuda")
            pages = int(batch.pages.max()) + 1

            def make(
                seqs: int = seqs, kind: str = kind, head_size: int = head_size,
                batch: FlatBatch = batch, rows: int = rows, rope: torch.Tensor = rope,
                pages: int = pages,
            ) -> Calls:  # fmt: skip
                filters, z_width = make_filter(kind, QKV, head_size)
                x, z = normal(rows, 3 * H), normal(rows, z_width)
                ring = normal(seqs + 1, WIDTH, 3 * H)
                k, v = (normal(pages, HEADS, 16, DIM) for _ in range(2))
                out = torch.empty_like(x)
                tiles, fused = prefill_tiles(kind)
                # Outputs are kept, or all calls of a graph would write to one place.
                kept: list[torch.Tensor] = []
                chosen = {tile_name(t): t for t in tiles} if tune else {"ours": None}
                calls: Calls = {
                    n: (lambda t=t: kept.append(conv(x, z, filters, ring, batch, tile=t)))
                    for n, t in chosen.items()
                }
                chosen = {"qkv " + tile_name(t): t for t in fused} if tune else {"qkv op": None}
                for n, t in chosen.items():
                    calls[n] = lambda t=t: kept.append(
                        qkv_rope_write(x, z, filters, ring, None, rope, k, v, batch, t)
                    )
                calls["copy"] = lambda: out.copy_(x)
                plain = {
                    f"qkv plain{m}x64w{w}": ConvTile(m, 64, w) for m, w in ((4, 4), (16, 4), (8, 2))
                }
                if kind == "lowrank":
                    for n, t in (plain if tune else {"qkv no conv": None}).items():
                        calls[n] = lambda t=t: kept.append(
                            qkv_rope_write(x, None, None, None, None, rope, k, v, batch, t)
                        )
                return calls

            name = f"{kind} {head_size or ''} [{seqs}, {length}]".replace("  ", " ")
            yield {"name": name, "bytes": 4 * rows * 3 * H, "make": make}


def rows_ops(tune: bool) -> Iterator[dict[str, Any]]:
    """Residual + RMSNorm, SiLU times up, and the latter with convolutions."""
    for rows in (1, 8, 64, 256):
        batch = make_batch(rows, 1, 100)

        def make(rows: int = rows, batch: FlatBatch = batch) -> Calls:
            x, residual, weight = normal(rows, H), normal(rows, H), normal(H)
            wide = normal(rows, 2 * INNER)
            filters, z_width = make_filter("lowrank", [(0, INNER), (INNER, 2 * INNER)])
            z, ring = normal(rows, z_width), normal(rows + 1, WIDTH, 2 * INNER)
            one, one_z = make_filter("lowrank", [(0, H)])
            code, one_ring = normal(rows, one_z), normal(rows + 1, WIDTH, H)
            calls: Calls = {
                "add_rms_norm": lambda: add_rms_norm(x, residual, weight, 1e-5),
                "silu_mul": lambda: silu_mul(wide),
                "conv after o": lambda: conv(x, code, one, one_ring, batch, residual),
            }
            for name, t in conv_candidates(rows, tune).items():
                calls["silu conv " + name] = lambda t=t: conv_silu_mul(
                    wide, z, filters, ring, batch, t
                )
            return calls

        yield {
            "name": f"rows {rows}",
            "bytes": rows * 2 * H * 4,
            "make": make,
            "set_bytes": 2_500_000,
        }


def decode_attention(tune: bool) -> Iterator[dict[str, Any]]:
    """One query a sequence over pages of several sizes; SDPA over contiguous keys."""
    shapes = [
        (1, 1024),
        (8, 1024),
        (32, 1024),
        (64, 1024),
        (128, 1024),
        (1, 4096),
        (32, 4096),
        (64, 4096),
    ]
    for seqs, context in shapes[:5] if tune else shapes:
        for page in (16, 64, 256) if not tune else (16,):
            batch = make_batch(seqs, 1, context - 1, page)

            def make(
                seqs: int = seqs, context: int = context, page: int = page, batch: FlatBatch = batch
            ) -> Calls:
                q = normal(seqs, HEADS, DIM)
                pages = int(batch.pages.max()) + 1
                k, v = (normal(pages, HEADS, page, DIM) for _ in range(2))
                out = torch.empty(seqs, HEADS * DIM, dtype=BF16, device="cuda")
                tiles: dict[str, SplitTile | DecodeTile | None] = {"ours": None}
                if tune:
                    tiles = {decode_name(t): t for t in decode_candidates(seqs)}
                calls: Calls = {
                    n: (lambda t=t: split_attention.split(q, k, v, batch, 0.088, None, out, 1, t))
                    for n, t in tiles.items()
                }
                if page == paged_peer.PAGE and paged_peer.missing() is None:
                    calls["torch varlen_attn, paged"] = paged_peer.attention(q, k, v, batch, 0.088)
                if page == 16:
                    kc, vc = (
                        p[1 : 1 + seqs * context // page].view(seqs, HEADS, context, DIM)
                        for p in (k, v)
                    )
                    calls["SDPA contiguous"] = lambda: F.scaled_dot_product_attention(
                        q.view(seqs, HEADS, 1, DIM), kc, vc
                    )
                return calls

            size = seqs * context * HEADS * DIM * 4
            yield {"name": f"{seqs} x {context} page {page}", "bytes": size, "make": make}


def decode_candidates(seqs: int) -> list[SplitTile | DecodeTile]:
    """Parts of a context such that all programs of a launch run at once, or nearly."""
    heads = seqs * HEADS
    tiles: list[SplitTile | DecodeTile] = [
        SplitTile(64, max(1, min(528 // heads, 16)), 8 if heads <= 528 else 4, 2)
    ]
    for keys, warps, ahead, programs in (
        (4, 4, 1, 528), (4, 4, 2, 396), (4, 2, 1, 1188), (4, 2, 2, 924), (2, 4, 2, 792),
        (2, 4, 4, 528), (4, 4, 3, 396), (2, 16, 1, 132), (2, 8, 2, 264),
    ):  # fmt: skip
        for splits in sorted({max(1, min(n // heads, 32)) for n in (programs, 2 * programs)}):
            tiles.append(DecodeTile(keys, splits, warps, ahead))
    return tiles


def decode_name(t: SplitTile | DecodeTile) -> str:
    kind = f"row a{t.ahead}" if isinstance(t, DecodeTile) else f"tile s{t.stages}"
    return f"{kind} {t.keys}w{t.warps}/{t.splits}"


def chunk(tune: bool) -> Iterator[dict[str, Any]]:
    """Prefill attention: whole prompts, and a chunk behind a cached context."""
    for seqs, rows, start in ((1, 4096, 0), (16, 256, 0), (1, 2048, 6144)):
        batch = make_batch(seqs, rows, start)

        def make(
            seqs: int = seqs, rows: int = rows, start: int = start, batch: FlatBatch = batch
        ) -> Calls:
            q = normal(seqs * rows, HEADS, DIM)
            pages = int(batch.pages.max()) + 1
            k, v = (normal(pages, HEADS, 16, DIM) for _ in range(2))
            out = torch.empty(seqs * rows, HEADS * DIM, dtype=BF16, device="cuda")
            tiles: dict[str, ChunkTile | None] = {"ours": None}
            if tune:
                tiles = {f"{m}x{n}w{w}s{s}": ChunkTile(m, n, w, s) for m, n, w, s in (
                    (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 4), (128, 64, 8, 2),
                    (128, 64, 8, 3), (128, 32, 8, 3), (128, 128, 8, 2),
                    (256, 32, 16, 3))}  # fmt: skip
            calls: Calls = {
                n: (lambda t=t: chunk_attention.chunk(q, k, v, batch, 0.088, None, out, 1, t))
                for n, t in tiles.items()
            }
            if paged_peer.missing() is None:
                peer_batch = make_batch(seqs, rows, start, paged_peer.PAGE)
                shape = (int(peer_batch.pages.max()) + 1, HEADS, paged_peer.PAGE, DIM)
                calls["torch varlen_attn, paged"] = paged_peer.attention(
                    q, normal(*shape), normal(*shape), peer_batch, 0.088
                )
            if start == 0:
                qc, kc, vc = (normal(seqs, HEADS, rows, DIM) for _ in range(3))
                calls["SDPA contiguous"] = lambda: F.scaled_dot_product_attention(
                    qc, kc, vc, is_causal=True
                )
            return calls

        seen = seqs * (rows * start + rows * (rows + 1) // 2)
        yield {"name": f"{seqs} x {rows} at {start}", "bytes": seqs * rows * H * 4, "make": make,
               "flops": 4 * seen * HEADS * DIM, "set_bytes": 60_000_000}  # fmt: skip


LAYERS = {"qkvz": (3 * H + 48, H), "o": (H, H), "gate_up": (2 * INNER, H), "down": (H, INNER),
          "lm_head": (VOCAB, H)}  # fmt: skip


def linear_layers(tune: bool) -> Iterator[dict[str, Any]]:
    """Each linear layer of a step beside cuBLAS."""
    for rows in (4, 8, 16, 32) if tune else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for layer, (outputs, depth) in LAYERS.items():

            def make(rows: int = rows, outputs: int = outputs, depth: int = depth) -> Calls:
                x, weight = normal(rows, depth), normal(outputs, depth)
                calls: Calls = {"cuBLAS": lambda: F.linear(x, weight)}
                tiles: dict[str, LinearTile | None] = {"ours": None}
                if tune:
                    tiles = {linear_name(t): t for t in linear_candidates(rows, outputs, depth)}
                for name, t in tiles.items():
                    calls[name] = lambda t=t: linear(x, weight, None, t)
                return calls

            if tune and layer == "lm_head" and rows not in (4, 16):
                continue
            size = outputs * depth * 2 + rows * (outputs + depth) * 2
            yield {"name": f"{layer} rows {rows}", "bytes": size, "make": make}


def linear_candidates(rows: int, outputs: int, depth: int) -> list[LinearTile]:
    tiles: list[LinearTile] = []
    if rows <= 4:
        tiles += [LinearTile(rows, n, k, w, 1) for n, k, w in (
            (2, 2048, 4), (1, 2048, 2), (1, 1024, 2), (2, 1024, 2), (4, 1024, 4))]  # fmt: skip
    if rows > 2:
        m = next(m for m in (8, 16, 32, 64) if rows <= m)
        tiles += [LinearTile(m, n, k, w, s, b) for n, k, w, s, b in (
            (64, 128, 4, 4, 1), (64, 256, 4, 3, 1), (32, 128, 4, 5, 1), (32, 256, 4, 4, 1),
            (16, 512, 4, 4, 4), (16, 512, 8, 5, 8), (16, 512, 8, 8, 8), (16, 1024, 8, 4, 8),
            (16, 1024, 16, 4, 16), (32, 512, 8, 4, 8))
            if (n + m) * k * s * 2 < 230_000]  # fmt: skip
        if (16 + m) * depth * 2 < 230_000:
            tiles += [LinearTile(m, 16, k, w, 0, w) for k, w in (
                (2048, 8), (1024, 4), (2048, 16))]  # fmt: skip
    return tiles


def linear_name(t: LinearTile) -> str:
    return f"{t.rows}x{t.outputs}k{t.depth}w{t.warps}s{t.stages}" + (
        f"/{t.slices}" if t.slices > 1 else ""
    )


SECTIONS: dict[str, Callable[[bool], Iterator[dict[str, Any]]]] = {
    "conv": decode_conv, "qkv": decode_qkv, "prefill": prefill_conv, "rows": rows_ops,
    "decode": decode_attention, "chunk": chunk, "linear": linear_layers,
}  # fmt: skip
