# pyright: reportArgumentType=false
"""QKV, norm, MLP and linear kernels against the reference in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from convserve.kernels import Ops, PackedLinear, triton_launch, tuning
from convserve.kernels.triton_linear import linear, linear_parts, silu_linear
from convserve.kernels.triton_norm import add_rms_norm
from convserve.kernels.triton_ops import TritonOps
from triton_cases import (
    DEVICE,
    assert_close,
    live_only,
    live_rows,
    make_filter,
    make_layout,
    make_ring,
    nan_bits,
    normal,
    wide,
)
from triton_checks import check_qkv

REFERENCE, TRITON = Ops(), TritonOps()
ON_GPU = DEVICE.type == "cuda"
DECODE = [(0, 1), (2, 1), (9, 1)]
SHORT = [(0, 3), (7, 1), (2, 2)]
CHUNK = [(3, 7), (11, 1), (0, 2)]


@pytest.mark.parametrize("kind", ["none", "static", "lowrank", "headwise"])
@pytest.mark.parametrize(
    ("runs", "ring_len"), [(DECODE, 4), (SHORT, 16), (CHUNK, 4)], ids=["decode", "short", "chunk"]
)
def test_qkv_over_every_step_shape(kind: str, runs: list[tuple[int, int]], ring_len: int) -> None:
    torch.manual_seed(1)
    layout = make_layout(runs, ring_len=ring_len, padding_rows=2, padding_seqs=1)
    check_qkv(layout, kind, torch.float32)


@pytest.mark.parametrize(
    ("heads", "head_dim", "rotary", "conv_head"),
    [((2, 1), 24, 24, 4), ((4, 2), 16, 8, 16), ((1, 1), 20, 12, 1), ((2, 2), 32, 32, 8),
     *([((16, 16), 128, 128, 16), ((32, 8), 64, 64, 64), ((9, 3), 64, 32, 1)] if ON_GPU else [])],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["lowrank", "headwise"])
def test_qkv_head_shapes(
    kind: str, heads: tuple[int, int], head_dim: int, rotary: int, conv_head: int
) -> None:
    torch.manual_seed(2)
    layout = make_layout(SHORT, ring_len=8)
    check_qkv(
        layout, kind, torch.float32, heads=heads, head_dim=head_dim, rotary=rotary,
        conv_head=conv_head,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["none", "lowrank", "headwise"])
@pytest.mark.parametrize("mode", ["head", "full"])
@pytest.mark.parametrize("order", ["conv_first", "norm_first"])
def test_qk_norm_in_both_orders(kind: str, mode: str, order: str) -> None:
    torch.manual_seed(3)
    check_qkv(make_layout(SHORT, ring_len=8), kind, torch.float32, norm=(mode, order))


@pytest.mark.parametrize("parts", [(1, 2), (0,), "one stream", "split inside k"])
def test_qkv_with_parts_not_convolved(parts: tuple[int, ...] | str) -> None:
    torch.manual_seed(4)
    check_qkv(make_layout(SHORT, ring_len=8), "static", torch.float32, parts=parts)
    if isinstance(parts, tuple):
        check_qkv(make_layout(SHORT, ring_len=8), "lowrank", torch.float32, parts=parts)


@pytest.mark.parametrize(
    ("kind", "norm", "parts"),
    [("headwise", None, (0, 1, 2)), ("headwise", ("head", "conv_first"), (0, 2)),
     ("static", None, "one stream")],
)  # fmt: skip
def test_qkv_of_long_runs(
    kind: str, norm: tuple[str, str] | None, parts: tuple[int, ...] | str
) -> None:
    """Tiles inside a sequence, over its edges, and past the last row."""
    torch.manual_seed(11)
    layout = make_layout([(0, 70), (5, 9), (2, 1)], padding_rows=2)
    check_qkv(
        layout, kind, torch.float32, head_dim=64, conv_head=16, norm=norm, parts=parts,
        tile=tuning.ConvTile(16, 64, 1, "runs"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "norm", "parts"),
    [(torch.float32, None, (0, 1, 2)), (torch.float32, ("head", "conv_first"), "one stream"),
     (torch.bfloat16, ("head", "conv_first"), (0, 1, 2))],
    ids=str,
)  # fmt: skip
def test_qkv_of_long_runs_with_lowrank_filters(
    dtype: torch.dtype, norm: tuple[str, str] | None, parts: tuple[int, ...] | str
) -> None:
    """Sequences of several stretches, of part of one, of a row and of none."""
    torch.manual_seed(12)
    layout = make_layout([(0, 70), (5, 9), (2, 1), (1, 35)], padding_rows=2, padding_seqs=1)
    check_qkv(
        layout, "lowrank", dtype, head_dim=64, norm=norm, parts=parts,
        tile=tuning.ConvTile(64, 32, 2, "runs", stages=2),
    )  # fmt: skip


NORM = ("head", "conv_first")
RAGGED = [(3, 1500), (0, 40), (7, 1), (2, 700)]


@pytest.mark.parametrize(
    ("kind", "heads", "runs", "norm"),
    [("lowrank", (1, 1), [(3, 500), (0, 40)], None),
     *([("lowrank", (4, 2), RAGGED, NORM), ("headwise", (4, 2), RAGGED, None)] if ON_GPU else [])],
)  # fmt: skip
def test_the_qkv_tile_of_many_rows(
    kind: str, heads: tuple[int, int], runs: list[tuple[int, int]], norm: tuple[str, str] | None
) -> None:
    """What the table picks for a long step."""
    torch.manual_seed(13)
    check_qkv(
        make_layout(runs), kind, torch.bfloat16, heads=heads, head_dim=64, conv_head=16, norm=norm
    )


@pytest.mark.parametrize("kind", ["none", "lowrank"])
def test_qkv_in_bfloat16(kind: str) -> None:
    torch.manual_seed(5)
    many = [(s % 7, 1) for s in range(200 if ON_GPU else 18)]
    check_qkv(make_layout(many), kind, torch.bfloat16, norm=("head", "conv_first"))


@pytest.mark.parametrize("kind", ["none", "static", "lowrank", "headwise"])
@pytest.mark.parametrize("runs", [DECODE, SHORT, CHUNK], ids=["decode", "short", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_add_rms_norm(kind: str, runs: list[tuple[int, int]], dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    layout = make_layout(runs, ring_len=8 if runs is SHORT else 4, padding_rows=1)
    rows, live, width = len(layout.batch.positions), live_rows(layout), 40
    filters, z_width = site(kind, [(0, width)], dtype)
    ring = make_ring(layout, 4, width, dtype)
    truth_ring = ring.double()
    x, z = normal(rows, width + 8, dtype=dtype)[:, :width], normal(rows, z_width + 8, dtype=dtype)
    residual, weight = normal(rows, width, dtype=dtype), normal(width, dtype=dtype)
    code = z[:, :z_width] if z_width else None
    got = TRITON.conv_add_rms_norm(x, code, filters, ring, residual, weight, 1e-5, layout.batch)
    truth = REFERENCE.conv_add_rms_norm(
        x[:live].double(), None if code is None else code[:live].double(), wide(filters),
        truth_ring, residual[:live].double(), weight.double(), 1e-5, live_only(layout.batch),
    )  # fmt: skip
    assert_close(got[0][:live], truth[0])
    assert_close(got[1][:live], truth[1])
    assert torch.equal(nan_bits(ring), nan_bits(truth_ring.to(dtype)))


@pytest.mark.parametrize("kind", ["none", "static", "lowrank", "headwise"])
@pytest.mark.parametrize("runs", [DECODE, SHORT, CHUNK], ids=["decode", "short", "chunk"])
@pytest.mark.parametrize("only_gate", [False, True])
def test_conv_silu_mul(kind: str, runs: list[tuple[int, int]], only_gate: bool) -> None:
    torch.manual_seed(7)
    layout = make_layout(runs, ring_len=8 if runs is SHORT else 4, padding_rows=1)
    rows, live, inner = len(layout.batch.positions), live_rows(layout), 36
    parts = [(0, inner)] if only_gate else [(0, inner), (inner, 2 * inner)]
    filters, z_width = site(kind, parts, torch.float32)
    channels = 1 if filters is None else filters.channels
    ring = make_ring(layout, 4, channels, torch.float32)
    truth_ring = ring.double()
    both = normal(rows, 2 * inner + z_width + 8)
    x, z = both[:, : 2 * inner], both[:, 2 * inner :]
    got = TRITON.conv_silu_mul(x, z, filters, ring, layout.batch)
    truth = REFERENCE.conv_silu_mul(
        x[:live].double(), z[:live].double(), wide(filters), truth_ring, live_only(layout.batch)
    )
    assert_close(got[:live], truth)
    assert torch.equal(nan_bits(ring), nan_bits(truth_ring.float()))


@pytest.mark.parametrize("shape", [(3, 48), (1, 576), (2, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(8)
    x, weight = normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    assert_close(
        TRITON.rms_norm(x, weight, 1e-6), REFERENCE.rms_norm(x.double(), weight.double(), 1e-6)
    )


@pytest.mark.parametrize("tile", [
    tuning.LinearTile(1, 4, 64, 1, 1), tuning.LinearTile(4, 2, 32, 1, 1),
    tuning.LinearTile(16, 16, 32, 4, 2), tuning.LinearTile(8, 32, 64, 2, 3, 2),
    tuning.LinearTile(8, 16, 64, 4, 0, 4), tuning.LinearTile(8, 16, 16, 4, 2, early=3),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("outputs", "depth"), [(24, 64), (10, 80)])
def test_small_linear(tile: tuning.LinearTile, bias: bool, outputs: int, depth: int) -> None:
    torch.manual_seed(9)
    rows = min(tile.rows, 3)
    x, weight = (
        normal(rows, depth, dtype=torch.bfloat16),
        normal(outputs, depth, dtype=torch.bfloat16),
    )
    shift = normal(outputs, dtype=torch.bfloat16) if bias else None
    truth = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
    assert_close(linear(x, weight, shift, tile), truth)
    gate, up = truth.chunk(2, dim=1)
    gated = silu_linear(x, weight, shift, tile)
    assert gated is not None
    assert_close(gated, F.silu(gate) * up)


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("early", [0, 9])
def test_a_norm_adds_up_parts_of_a_linear(parts: int, early: int) -> None:
    """Each step of depth counts once, fetched early or not, and the bias too."""
    torch.manual_seed(11)
    x, weight = normal(5, 200, dtype=torch.bfloat16), normal(24, 200, dtype=torch.bfloat16)
    shift, residual, norm = normal(24, dtype=torch.bfloat16), normal(5, 24), normal(24)
    tile = tuning.LinearTile(16, 16, 32, 4, 2, early=early, parts=parts)
    sums = linear_parts(x, weight, shift, tile)
    assert sums is not None
    whole = F.linear(x.double(), weight.double(), shift.double())
    assert_close(sums.sum(0), whole)
    for got, truth in zip(
        add_rms_norm(sums, residual, norm, 1e-5),
        REFERENCE.add_rms_norm(whole, residual.double(), norm.double(), 1e-5),
        strict=True,
    ):
        assert_close(got, truth)


@pytest.mark.parametrize(("rows", "depth"), [(3, 64), (40, 4200)])
def test_linear_add_rms_norm(rows: int, depth: int) -> None:
    torch.manual_seed(12)
    x, weight = normal(rows, depth, dtype=torch.bfloat16), normal(64, depth, dtype=torch.bfloat16)
    residual, norm = normal(rows, 64, dtype=torch.bfloat16), normal(64, dtype=torch.bfloat16)
    packed = TRITON.pack_linear(weight / depth**0.5, None)
    truth = REFERENCE.linear_add_rms_norm(
        x.double(), PackedLinear(packed.weight.double(), None, depth, 64),
        residual.double(), norm.double(), 1e-5,
    )  # fmt: skip
    for got, expected in zip(
        TRITON.linear_add_rms_norm(x, packed, residual, norm, 1e-5), truth, strict=True
    ):
        assert_close(got, expected)


def test_the_table_asks_for_no_more_than_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuned on one GPU, run on another: cuBLAS, not an error at the first token."""
    x, weight = normal(5, 2048, dtype=torch.bfloat16), normal(32, 2048, dtype=torch.bfloat16)
    truth = F.linear(x.double(), weight.double())
    monkeypatch.setattr(triton_launch, "_shared_memory", lambda _device: 65_536)
    assert silu_linear(x, weight, None) is None
    assert_close(linear(x, weight, None), truth)


def test_silu_linear_where_the_table_has_no_kernel() -> None:
    torch.manual_seed(10)
    weight, x = normal(24, 64), normal(3, 64)
    truth = REFERENCE.silu_linear(x.double(), REFERENCE.pack_linear(weight.double(), None))
    assert_close(TRITON.silu_linear(x, TRITON.pack_linear(weight, None)), truth)


def site(kind: str, parts: list[tuple[int, int]], dtype: torch.dtype):
    """A filter of `kind`, or (None, 0)."""
    return (None, 0) if kind == "none" else make_filter(kind, 4, parts, dtype=dtype)
