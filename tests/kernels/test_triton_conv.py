# pyright: reportArgumentType=false
"""The conv kernels against the reference in float64: a wrong tap, row, or ring slot shows here."""

from __future__ import annotations

import itertools

import pytest
import torch
from convserve.kernels import Ops, tuning
from convserve.kernels.triton_conv import conv
from convserve.kernels.triton_ops import TritonOps
from torch import Tensor
from triton_cases import (
    DEVICE,
    make_filter,
    make_layout,
    make_ring,
    nan_bits,
    normal,
)
from triton_checks import check_conv

REFERENCE, TRITON = Ops(), TritonOps()
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.bfloat16]
DIMS = [48, 100, 576, 2048] if ON_GPU else [48, 20]

STEPS = {
    "decode": ([(0, 1), (1, 1), (2, 1), (9, 1)], 4),
    "decode padded": ([(5, 1), (3, 1)], 8),
    "ragged, in place": ([(0, 3), (7, 1), (2, 2), (4, 3)], 16),
    "ragged, ring just too short": ([(6, 3), (1, 2)], 4),
    "chunk wraps the ring": ([(3, 9), (0, 4), (11, 1), (2, 5)], 4),
}
if ON_GPU:
    STEPS["long chunks"] = ([(0, 130), (5, 63), (1, 1), (3, 777)], 4)
    STEPS["many decodes"] = ([(i, 1) for i in range(150)], 8)


def padding_of(name: str) -> dict[str, int]:
    return {"padding_rows": 3, "padding_seqs": 3} if "padded" in name else {}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["static", "lowrank", "headwise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_over_every_step_shape(step: str, kind: str, dtype: torch.dtype) -> None:
    """Two streams of the three parts of a column slice; the part between them passes through."""
    torch.manual_seed(1)
    runs, ring_len = STEPS[step]
    layout = make_layout(runs, ring_len=ring_len, **padding_of(step))
    dim = DIMS[0]
    filters, z_width = make_filter(
        kind, 4, [(0, dim), (dim + 20, 2 * dim + 20)], head_size=8, dtype=dtype
    )
    check_conv(layout, filters, z_width, dtype, columns=2 * dim + 20)


@pytest.mark.parametrize(
    ("width", "rank", "head_size", "dim"),
    [
        (2, 1, 1, 20), (3, 5, 2, 48), (5, 16, 16, 48), (4, 17, 48, 48), (4, 64, 3, 48),
        (2, 15, 4, 100),
        *([(4, 16, 64, 2048), (3, 15, 16, 576), (5, 64, 1, 100), (4, 128, 64, 576)]
          if ON_GPU else []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["static", "lowrank", "headwise"])
def test_conv_widths_ranks_and_heads(
    kind: str, width: int, rank: int, head_size: int, dim: int
) -> None:
    torch.manual_seed(2)
    layout = make_layout([(0, 2), (6, 1), (3, width)], ring_len=8)
    filters, z_width = make_filter(kind, width, [(0, dim)], rank=rank, head_size=head_size)
    check_conv(layout, filters, z_width, torch.float32, columns=dim)


TILES = [
    tuning.ConvTile(1, 32, 1, "fma"), tuning.ConvTile(4, 32, 2, "fma"),
    tuning.ConvTile(1, 64, 4, "sum"),
    tuning.ConvTile(16, 32, 1, "swap"), tuning.ConvTile(64, 32, 4, "swap"),
    tuning.ConvTile(16, 64, 4, "dot", 2),
]  # fmt: skip


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_conv_tiles(tile: tuning.ConvTile) -> None:
    """Every way of making low-rank filters, on channels that do not fill the last tile."""
    torch.manual_seed(6)
    layout = make_layout([(0, 2), (6, 1), (3, 70 if tile.rows == 64 else 20)], ring_len=8)
    filters, z_width = make_filter("lowrank", 4, [(0, 40), (40, 48)], dtype=torch.bfloat16)
    check_conv(layout, filters, z_width, torch.bfloat16, columns=48, tile=tile)


@pytest.mark.parametrize(
    ("kind", "dtype", "width", "head_size", "tile"),
    [("static", torch.float32, 5, 8, (8, 256, 1)), ("static", torch.bfloat16, 4, 8, (64, 32, 1)),
     ("headwise", torch.float32, 4, 4, (8, 512, 2)),
     ("headwise", torch.bfloat16, 4, 8, (64, 32, 1))],
    ids=str,
)  # fmt: skip
def test_long_runs(
    kind: str, dtype: torch.dtype, width: int, head_size: int, tile: tuple[int, int, int]
) -> None:
    """Sequences of several stretches, of part of one, of a row; an uncovered part between."""
    torch.manual_seed(7)
    layout = make_layout([(0, 45), (5, 20), (2, 1)], ring_len=8, padding_rows=2, padding_seqs=1)
    filters, z_width = make_filter(
        kind, width, [(0, 64), (80, 112)], head_size=head_size, dtype=dtype
    )
    check_conv(layout, filters, z_width, dtype, columns=112, tile=tuning.ConvTile(*tile, "runs"))


@pytest.mark.parametrize(
    ("dtype", "width", "rank", "ring_len"),
    [(torch.float32, 4, 16, 4), (torch.bfloat16, 4, 16, 4), (torch.float32, 5, 15, 8),
     (torch.bfloat16, 2, 5, 16)],
    ids=str,
)  # fmt: skip
def test_long_runs_of_lowrank_filters(
    dtype: torch.dtype, width: int, rank: int, ring_len: int
) -> None:
    """Sequences of several stretches, of part of one, of a row and of none; two wrap the ring."""
    torch.manual_seed(7)
    runs = [(0, 130), (5, 67), (2, 1), (1, 33)]
    layout = make_layout(runs, ring_len=ring_len, padding_rows=3, padding_seqs=2)
    filters, z_width = make_filter(
        "lowrank", width, [(0, 128), (128, 192)], rank=rank, dtype=dtype, bias=width != 4,
        silu=width == 5, scale=0.5 if width == 2 else 1.0,
    )  # fmt: skip
    channels = 32 if width == 5 else 64
    tile = tuning.ConvTile(64, channels, channels // 32, "runs", stages=3, registers=168)
    check_conv(layout, filters, z_width, dtype, columns=192, tile=tile)


@pytest.mark.parametrize("kind", ["lowrank", "static"])
def test_long_runs_add_a_residual(kind: str) -> None:
    torch.manual_seed(9)
    layout = make_layout([(2, 70)])
    filters, z_width = make_filter(kind, 4, [(0, 32)])
    x, z, residual = normal(70, 32), normal(70, z_width), normal(70, 32)
    ring = make_ring(layout, 4, 32, torch.float32)
    tile = tuning.ConvTile(32, 32, 1, "runs", stages=2)
    alone = conv(x, z, filters, ring.clone(), layout.batch, tile=tile)
    both = conv(x, z, filters, ring, layout.batch, residual, tile)
    torch.testing.assert_close(both, alone + residual)


LONG = [(3, 1500), (0, 40), (7, 1), (2, 700)] if ON_GPU else [(3, 500), (0, 40)]


@pytest.mark.parametrize(
    ("kind", "edge", "columns"),
    [("lowrank", 64, 96), ("lowrank", 64, 112),
     *([("lowrank", 3072, 6144), ("lowrank", 576, 1152), ("headwise", 3072, 6144)]
       if ON_GPU else [])],
)  # fmt: skip
def test_the_tile_of_many_rows(kind: str, edge: int, columns: int) -> None:
    """What the table picks for a long step, of streams that are whole tiles and of others."""
    torch.manual_seed(8)
    parts = [(0, edge), (edge, columns)]
    filters, z_width = make_filter(kind, 4, parts, head_size=8, dtype=torch.bfloat16)
    check_conv(make_layout(LONG), filters, z_width, torch.bfloat16, columns=columns)


@pytest.mark.parametrize(("bias", "silu", "scale"), [(True, True, 0.5), (False, False, 2.0)])
def test_conv_epilogue(bias: bool, silu: bool, scale: float) -> None:
    torch.manual_seed(3)
    layout = make_layout([(0, 1), (4, 1)])
    filters, z = make_filter("lowrank", 4, [(0, 48)], bias=bias, silu=silu, scale=scale)
    check_conv(layout, filters, z, torch.float32, columns=48)


@pytest.mark.parametrize("kind", ["lowrank", "headwise"])
def test_outputs_do_not_depend_on_where_a_prompt_is_cut(kind: str) -> None:
    """Bitwise, through the ring: one chunk of 11 against chunks of 1, 4, 5, 1."""
    torch.manual_seed(4)
    dtype = torch.bfloat16
    filters, z_width = make_filter(kind, 4, [(0, 48)], dtype=dtype)
    x, z = normal(11, 48, dtype=dtype), normal(11, z_width, dtype=dtype)
    whole_layout = make_layout([(0, 11)])
    ring = make_ring(whole_layout, 4, 48, dtype)
    whole = TRITON.conv(x, z, filters, ring, whole_layout.batch)
    parts = []
    cut_ring = torch.full_like(ring, float("nan"))
    for start, stop in itertools.pairwise([0, 1, 5, 10, 11]):
        batch = make_layout([(start, stop - start)]).batch
        parts.append(TRITON.conv(x[start:stop], z[start:stop], filters, cut_ring, batch))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("seqs", [1, 2, 3, 5] if not ON_GPU else [1, 3, 17, 63, 64, 129, 256])
@pytest.mark.parametrize("padded", [0, 1, 3])
def test_padding_changes_nothing(seqs: int, padded: int) -> None:
    """A padded batch writes its live rows, bit for bit as alone, and nothing else."""
    torch.manual_seed(5)
    runs = [(3 * s, 1) for s in range(seqs)]
    alone = make_layout(runs)
    filters, z_width = make_filter("lowrank", 4, [(0, 48)])
    ring = make_ring(alone, 4, 48, torch.float32)
    x, z = normal(seqs + padded, 48), normal(seqs + padded, z_width)
    other_ring = ring.clone()
    truth = TRITON.conv(x[:seqs], z[:seqs], filters, ring, alone.batch)
    padded_batch = pad(alone.batch, padded)
    got = TRITON.conv(x, z, filters, other_ring, padded_batch)
    torch.testing.assert_close(got[:seqs], truth, rtol=1e-6, atol=1e-6)
    assert torch.equal(nan_bits(ring), nan_bits(other_ring))


def pad(batch, count: int):
    """`batch` with `count` padding rows and as many padding sequences."""
    from dataclasses import replace

    def grown(tensor: Tensor, value: int) -> Tensor:
        return torch.cat((tensor, tensor.new_full((count, *tensor.shape[1:]), value)))

    return replace(
        batch, positions=grown(batch.positions, -1), row_seq=grown(batch.row_seq, 0),
        starts=grown(batch.starts, 0), slots=grown(batch.slots, 0), pages=grown(batch.pages, 0),
        offsets=grown(batch.offsets, int(batch.offsets[-1])), kv_rows=grown(batch.kv_rows, -1),
        ring_rows=grown(batch.ring_rows, -1), spans=None,
    )  # fmt: skip
