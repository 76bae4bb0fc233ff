"""One hybrid layer's kernels on a GPU beside other people's and the byte floor, in CUDA graphs.

    python bench/hybrid_layers.py [jet] [delta] [ssd] [gated] [chunks] [tiles] [--counts 1 8 64]

jet: a whole Jet-Nemotron-2B mixer, one decode step. delta, ssd: a step of the gated delta rule and
of Mamba-2's SSD. chunks: longer runs of both. gated: LFM2's convolution. tiles: candidate launch
shapes of the recurrent kernels. Operands are sets of 220 MB and more in all, so that they come from
memory; a figure is what a call adds to a chain of its kind. See `hybrid_peers` for what it is
compared with. `--tiny --device cpu` runs ours once, to try the script out.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import _import  # noqa: F401  (makes `convserve` importable)
import torch
import torch.nn.functional as F
from convserve.cache.specs import LayerState
from convserve.engine.models.config import parse_config
from convserve.engine.models.layers import Norm
from convserve.engine.models.mixer_builder import load_mixer
from convserve.engine.models.mixers import GatedDelta
from convserve.kernels import (
    ConvFilter,
    DeltaParts,
    FlatBatch,
    SSDParts,
    Stream,
    select_ops,
    triton_generated_conv,
    triton_recurrent,
)
from hybrid_cases import BANDWIDTH, JET, START, RandomReader, attempt, graph_us
from hybrid_peers import (
    compare,
    copies,
    flash_linear_attention,
    gap,
    jet_block,
    their_state,
    their_step,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

STEP_TILES = (
    (32, 1, 1), (32, 1, 2), (32, 1, 4), (64, 1, 2), (64, 1, 4), (64, 1, 8), (128, 1, 4),
    (128, 1, 8), (64, 4, 8), (256, 1, 8),
)  # fmt: skip
GENERATE_TILES = ((8, 4), (16, 4), (16, 8), (32, 4), (32, 8))
CHUNK_TILES = ((16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 4), (64, 8))
DELTAS = {"Jet-Nemotron-2B": (12, 12, 96, 256), "Qwen3-Next": (16, 32, 128, 128)}
"""Key heads, value heads, key and value channels of a head."""
CHUNKS = ((1, 2048), (8, 256))
"""Sequences, rows of each."""


class Layers:
    """The parts, on one device."""

    def __init__(
        self, device: torch.device, counts: list[int], tiny: bool, only: str, limit: float
    ) -> None:
        self.device, self.counts, self.tiny, self.only = device, counts, tiny, only
        self.ops = select_ops(device)
        self.dtype, self.limit = torch.bfloat16, limit
        self.bytes = 1 if tiny else 220_000_000

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Random numbers."""
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device)

    def batch(self, count: int, rows: int, ring_len: int = 4) -> FlatBatch:
        """So many sequences with so many rows each, all at one position."""
        seqs = torch.arange(count, dtype=torch.int32, device=self.device)
        positions = torch.arange(rows, device=self.device).repeat(count) + START
        slots = (seqs + 1).repeat_interleave(rows).long()
        ring_rows = slots * ring_len + positions % ring_len
        kept = torch.arange(rows, device=self.device).repeat(count) >= rows - ring_len
        return FlatBatch(
            positions=positions,
            row_seq=seqs.repeat_interleave(rows),
            starts=torch.full_like(seqs, START),
            offsets=torch.arange(0, count * rows + 1, rows, dtype=torch.int32, device=self.device),
            slots=seqs + 1,
            pages=torch.zeros((count, 1), dtype=torch.int32, device=self.device),
            kv_rows=torch.zeros(count * rows, dtype=torch.int64, device=self.device),
            ring_rows=torch.where(kept, ring_rows, -1),
            ring_len=ring_len,
            max_rows=rows,
            max_len=START + rows,
            spans=None if self.device.type == "cuda" else ((START, rows),) * count,
        )

    def time(self, name: str, calls: list[Callable[[], Any]]) -> float | None:
        """Microseconds a call; None if it fails."""
        if self.device.type != "cuda":
            calls[0]()
            return 0.0
        return attempt(name, partial(graph_us, calls))

    def report(self, name: str, floor_bytes: float, cells: dict[str, float | None]) -> None:
        """One line: floor, then each cell."""
        text = ", ".join(f"{k} {'failed' if v is None else f'{v:.1f}'}" for k, v in cells.items())
        print(f"{name}: floor {floor_bytes / BANDWIDTH * 1e6:.1f} us; {text}", flush=True)

    def jet(self) -> None:
        """A Jet mixer from normed input to output, ours with the residual and the next norm."""
        config = parse_config(JET)
        mixer = config.mixers[0]
        assert isinstance(mixer, GatedDelta)
        hidden = config.hidden_size
        theirs = None if self.tiny else attempt("NVIDIA's block", lambda: jet_block(JET))
        for count in self.counts:
            state_size = count * mixer.value_heads * mixer.key_dim * mixer.value_dim * 4
            weights = None if theirs is None else theirs.state_dict()
            reader = _Weights(self.dtype, self.device, weights)
            block = load_mixer(mixer, self.ops, reader, "jet", hidden)  # pyright: ignore
            weight_bytes = reader.total_elements * 2
            sets = max(1, -(-self.bytes // (weight_bytes + state_size)))
            blocks = [block]
            for _ in range(sets - 1):
                more = _Weights(self.dtype, self.device, weights)
                blocks.append(load_mixer(mixer, self.ops, more, "jet", hidden))  # pyright: ignore
            batch = self.batch(count, 1)
            x, residual = self.normal(count, hidden), self.normal(count, hidden)
            norm = Norm(self.normal(hidden), 1e-6)
            rope = self.normal(count, 0, dtype=torch.float32)
            shape = (count + 1, mixer.value_heads, mixer.key_dim, mixer.value_dim)
            states = [
                LayerState(
                    None,
                    None,
                    rings={"qkv": self.normal(count + 1, 4, mixer.value_width)},
                    recurrent=self.normal(*shape, dtype=torch.float32),
                )
                for _ in range(sets)
            ]
            cells: dict[str, float | None] = {}
            calls = [
                partial(b, x, residual, norm, rope, s, batch)
                for b, s in zip(blocks, states, strict=True)
            ]
            if theirs is not None:
                attempt("compare", lambda: compare(blocks[0], theirs, x, states[0], batch))  # noqa: B023
            for tile in (None, *GENERATE_TILES):
                triton_generated_conv.MOST = 64 if tile else 0
                triton_generated_conv.generate_tile = _fixed(tile or ())
                name = f"filters in registers {tile}" if tile else "filters by a linear layer"
                cells[name] = self.time(name, calls)
            if theirs is not None:
                calls = [
                    partial(their_step, t, x, *their_state(s, count))
                    for t, s in zip(copies(theirs, sets), states, strict=True)
                ]
                cells["NVIDIA's block"] = self.time("NVIDIA's block", calls)
            ring_bytes = count * mixer.value_width * 2 * 4
            floor = weight_bytes + 2 * state_size + ring_bytes
            self.report(f"jet mixer step, batch {count}", floor, cells)

    def delta(self) -> None:
        """The gated delta rule: ours with SiLU and the gated norm; fla's without and with."""
        fla = None if self.tiny else flash_linear_attention()
        for name, dims in DELTAS.items():
            for count in self.counts:
                attempt(name, partial(self._delta, fla, name, dims, count, 1))

    def chunks(self) -> None:
        """Both recurrences over longer runs, of families whose names hold `--only`."""
        fla = None if self.tiny else flash_linear_attention()
        for count, rows in CHUNKS:
            for name, dims in DELTAS.items():
                if self.only in name:
                    attempt(name, partial(self._delta, fla, name, dims, count, rows), self.limit)
            if self.only in "Mamba-2":
                attempt("ssd", partial(self._ssd, fla, count, rows), self.limit)

    def _delta(
        self, fla: Any, name: str, dims: tuple[int, int, int, int], count: int, rows: int
    ) -> None:
        key_heads, heads, key, value = dims
        call, columns, states, parts = self.delta_call(dims, count, rows)
        total = count * rows
        q, k, v = columns[0].split(parts.widths, dim=1)
        gate, b, a = columns[1:]
        kind = "step" if rows == 1 else f"chunk of {rows} rows"
        title = f"delta {name} {kind}, batch {count}"
        moved = 2 * states[0][1:].nbytes + total * (sum(parts.widths) + 2 * heads * value) * 2
        us = self.time("ours", [partial(call, s) for s in states])
        self.report(title, moved, {"ours": us})
        if fla is not None:
            cells: dict[str, float | None] = {}
            shape = (count, 1) if rows == 1 else (1, total)
            q, k = (F.silu(t).view(*shape, key_heads, key) for t in (q, k))
            v = v.reshape(*shape, heads, value).contiguous()
            g = (parts.rate * F.softplus(a.float() + parts.dt_bias)).view(*shape, heads)
            beta = b.sigmoid().view(*shape, heads).contiguous()
            seqlens = torch.arange(0, total + 1, rows, device=self.device)
            options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
            if rows > 1 and count > 1:
                options["cu_seqlens"] = seqlens
            rule = fla.fused_recurrent_gated_delta_rule if rows == 1 else fla.chunk_gated_delta_rule
            from fla.modules import FusedRMSNormGated  # pyright: ignore[reportMissingImports]

            norm = FusedRMSNormGated(value, eps=parts.eps).to(self.device, self.dtype)
            norm.weight.data = parts.norm
            gates = gate.reshape(*shape, heads, value).contiguous()

            def run(state: Tensor, *, is_normed: bool) -> Tensor:
                with torch.no_grad():
                    o, _ = rule(q, k, v, g=g, beta=beta, initial_state=state, **options)
                    return norm(o, gates) if is_normed else o

            first = states[0][1:].clone()
            mine = call(states[0].clone())
            other = run(first, is_normed=True).reshape(mine.shape)
            cells["fla's rule"] = self.time(
                "fla", [partial(run, s[1:], is_normed=False) for s in states]
            )
            cells["with its gated norm"] = self.time(
                "fla", [partial(run, s[1:], is_normed=True) for s in states]
            )
            print(f"  difference from fla's: {gap(mine, other):.1e}", flush=True)
            self.report(title, moved, cells)

    def delta_call(
        self, dims: tuple[int, int, int, int], count: int, rows: int
    ) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...], list[Tensor], DeltaParts]:
        """Our rule over columns of one tensor -> (call, (qkv, gate, b, a), states, parts)."""
        key_heads, heads, key, value = dims
        wide = torch.float32
        parts = DeltaParts(
            key_heads, heads, key, value, (True, True, False),
            -self.normal(heads, dtype=wide).abs(), self.normal(heads, dtype=wide),
            self.normal(value), 1e-5,
        )  # fmt: skip
        width = sum(parts.widths)
        # Rows of one linear layer's output, which is as wide as a multiple of 16.
        gate_end = width + heads * value
        columns = self.normal(count * rows, -(-(gate_end + 2 * heads) // 16) * 16)
        qkv, gate = columns[:, :width], columns[:, width:gate_end]
        b, a = columns[:, gate_end:][:, : 2 * heads].chunk(2, dim=1)
        shape = (count + 1, heads, key, value)
        sets = max(2, min(64, self.bytes // (4 * count * heads * key * value)))
        states = [self.normal(*shape, dtype=wide) for _ in range(sets)]
        batch = self.batch(count, rows)

        def call(state: Tensor) -> Tensor:
            return self.ops.delta_rule(parts, qkv, None, None, None, gate, b, a, state, batch)

        return call, (qkv, gate, b, a), states, parts

    def ssd(self) -> None:
        """Mamba-2 2.7B's SSD with its gated norm, and fla's rule for scalar decays."""
        fla = None if self.tiny else flash_linear_attention()
        for count in self.counts:
            attempt("ssd", partial(self._ssd, fla, count, 1))

    def _ssd(self, fla: Any, count: int, rows: int) -> None:
        heads, dim, groups, size = (80, 64, 1, 128)
        wide = torch.float32
        parts = SSDParts(
            heads, dim, groups, size, -self.normal(heads, dtype=wide).abs(),
            self.normal(heads, dtype=wide), self.normal(heads, dtype=wide),
            self.normal(heads * dim), 1e-5,
        )  # fmt: skip
        total, width = count * rows, sum(parts.widths)
        columns = self.normal(total, heads * dim + width + heads)
        gate, xbc = columns[:, : heads * dim], columns[:, heads * dim :][:, :width]
        dt = columns[:, -heads:]
        sets = max(2, min(64, self.bytes // (4 * count * heads * dim * size)))
        states = [self.normal(count + 1, heads, size, dim, dtype=wide) for _ in range(sets)]
        batch = self.batch(count, rows)

        def call(state: Tensor) -> Tensor:
            return self.ops.ssd(parts, xbc, None, None, None, gate, dt, state, batch)

        kind = "step" if rows == 1 else f"chunk of {rows} rows"
        title = f"ssd {heads} x {size} x {dim} {kind}, batch {count}"
        moved = 2 * states[0][1:].nbytes + total * (width + 2 * heads * dim) * 2
        us = self.time("ours", [partial(call, s) for s in states])
        self.report(title, moved, {"ours": us})
        if fla is not None:
            cells: dict[str, float | None] = {}
            shape = (count, 1) if rows == 1 else (1, total)
            x, k, q = xbc.split(parts.widths, dim=1)
            step = F.softplus(dt.float() + parts.dt_bias)
            x = x.reshape(*shape, heads, dim)
            v = (x * step.view(*shape, heads, 1)).to(self.dtype)
            q, k = (t.reshape(*shape, 1, size).repeat(1, 1, heads, 1) for t in (q, k))
            g = (parts.rate * step).view(*shape, heads)
            options: dict[str, Any] = {"output_final_state": True, "scale": 1.0}
            if rows > 1 and count > 1:
                options["cu_seqlens"] = torch.arange(0, total + 1, rows, device=self.device)
            rule = fla.fused_recurrent_simple_gla if rows == 1 else fla.chunk_simple_gla

            def run(state: Tensor) -> Tensor:
                with torch.no_grad():
                    return rule(q, k, v, g=g, initial_state=state, **options)[0]

            mine = call(states[0].clone())
            y = run(states[0][1:].clone()).float() + x.float() * parts.skip[:, None]
            y = y.reshape(total, -1) * F.silu(gate.float())
            other = F.rms_norm(y, (heads * dim,), parts.norm.float(), parts.eps)
            print(f"  difference from fla's: {gap(mine, other):.1e}", flush=True)
            cells["fla's rule alone"] = self.time("fla", [partial(run, s[1:]) for s in states])
            self.report(title, moved, cells)

    def gated(self) -> None:
        """LFM2-1.2B's gated convolution of 2048 channels, three taps."""
        channels, width = 2048, 3
        filters = ConvFilter(
            "static", width, (Stream(0, channels, 0),),
            self.normal(width, channels, dtype=torch.float32),
        )  # fmt: skip
        for count, rows in (*((c, 1) for c in self.counts), (1, 2048)):
            moved = count * channels * 2 * (rows * 4 + 3)
            sets = max(2, min(256, self.bytes // moved))
            xs = [self.normal(count * rows, 3 * channels) for _ in range(sets)]
            rings = [self.normal(count + 1, 4, channels) for _ in range(sets)]
            batch = self.batch(count, rows)
            calls = [
                partial(self.ops.gated_conv, x, filters, ring, batch)
                for x, ring in zip(xs, rings, strict=True)
            ]
            name = f"gated conv {channels} x {width}, {count} x {rows} rows"
            self.report(name, moved, {"ours": self.time("ours", calls)})

    def tiles(self) -> None:
        """Every candidate launch shape of the delta rule."""
        step_tile, chunk_tile = triton_recurrent.step_tile, triton_recurrent.chunk_tile
        for name, dims in DELTAS.items():
            for count, rows in (*((c, 1) for c in self.counts), *CHUNKS):
                call, _, states, _ = self.delta_call(dims, count, rows)
                cells: dict[str, float | None] = {}
                for tile in (None, *(STEP_TILES if rows == 1 else CHUNK_TILES)):
                    if tile is not None:
                        which = "step_tile" if rows == 1 else "chunk_tile"
                        setattr(triton_recurrent, which, _fixed(tile))
                    us = self.time(str(tile), [partial(call, s) for s in states])
                    cells[str(tile or "table")] = us
                triton_recurrent.step_tile, triton_recurrent.chunk_tile = step_tile, chunk_tile
                self.report(f"tiles {name} {count} x {rows}", 2 * states[0].nbytes, cells)


class _Weights(RandomReader):
    """A mixer's tensors from another module's, or random."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, given: dict[str, Tensor] | None
    ) -> None:
        super().__init__(dtype, device)
        self._given = given

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """As RandomReader; a copy of its own each time."""
        if self._given is None:
            return super().take(name, shape, dtype)
        weight = self._given[name.removeprefix("jet.")]
        assert weight.shape == shape, f"{name}: {weight.shape}, not {shape}"
        self.total_elements += weight.numel()
        return weight.to(dtype or self._dtype, copy=True)


def _fixed(tile: tuple[int, ...]) -> Callable[..., Any]:
    return lambda *_: tile


def main() -> None:
    """Runs the parts that were named, or all but the tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("jet", "delta", "ssd", "gated", "chunks", "tiles")
    parser.add_argument("parts", nargs="*", choices=[*names, []], help="all but tiles if none")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit", type=float, default=60, help="seconds of a case of chunks")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", default="", help="chunks of families whose names hold this")
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(), "torch", torch.__version__)
    layers = Layers(device, args.counts, args.tiny, args.only, args.limit)
    for name in args.parts or names[:-1]:
        started = time.perf_counter()
        attempt(name, getattr(layers, name))
        print(f"-- {name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
