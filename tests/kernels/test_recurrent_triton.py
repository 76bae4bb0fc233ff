"""Recurrent state in place on a GPU: what a slot of the next request would read, and every output,
against the reference in float64, for any mix of runs, starts and padding."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import pytest
import torch
from convserve.kernels import (
    ConvFilter,
    DeltaParts,
    Ops,
    PackedLinear,
    SSDParts,
    Stream,
    triton_recurrent,
)
from convserve.kernels.triton_ops import TritonOps
from triton_cases import (
    DEVICE,
    Layout,
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

if TYPE_CHECKING:
    from torch import Tensor

TRITON, REFERENCE = TritonOps(), Ops()
DECODE = [(0, 1), (7, 1), (40, 1), (0, 1)]
MIXED = [(0, 1), (3, 17), (0, 33), (25, 1), (9, 16)]


def make_state(layout: Layout, *shape: int) -> Tensor:
    """NaN where a sequence starts, and in every slot that is nobody's."""
    state = torch.full((layout.num_slots, *shape), torch.nan)
    for (start, _), slot in zip(layout.batch.spans or (), layout.batch.slots.tolist(), strict=True):
        if start:
            state[slot] = torch.randn(shape)
    return state.to(DEVICE)


Parts = TypeVar("Parts", DeltaParts, SSDParts)


def wide_parts(parts: Parts) -> Parts:
    return replace(parts, **{name: wide_value(value) for name, value in vars(parts).items()})


def wide_value(value: object) -> object:
    if isinstance(value, PackedLinear):
        return replace(value, weight=wide(value.weight), bias=wide(value.bias))
    return wide(value)


def delta_parts(
    key_heads: int, value_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> DeltaParts:
    return DeltaParts(
        key_heads,
        value_heads,
        key_dim,
        value_dim,
        silu=(True, False, True),
        rate=-torch.rand(value_heads, device=DEVICE) * 2,
        dt_bias=normal(value_heads),
        norm=normal(value_dim, dtype=dtype),
        eps=1e-5,
    )


def wide_filter(filters: ConvFilter) -> ConvFilter:
    """Everything in float64."""
    bias = None if filters.bias is None else filters.bias.double()
    up = None if filters.up is None else filters.up.double()
    return replace(filters, static=filters.static.double(), bias=bias, up=up)


CONVS = ("none", "all static", "values static", "every channel", "head-wise", "low-rank")


def conv_of(
    conv: str, widths: tuple[int, int, int], dtype: torch.dtype
) -> tuple[ConvFilter | None, int]:
    """A convolution of q, k and v, and the z columns it reads."""
    q, k, v = widths
    value = (q + k, q + k + v)
    if conv == "none":
        return None, 0
    parts = [value]
    if conv in ("head-wise", "low-rank"):
        parts = [(0, q), value]
    if conv == "all static":
        parts = [(0, q + k + v)]
    kind = {"every channel": "headwise", "head-wise": "headwise", "low-rank": "lowrank"}
    size = 1 if conv == "every channel" else 4
    return make_filter(
        kind.get(conv, "static"), 4, parts, head_size=size, rank=3, silu=True, dtype=dtype,
        bias=conv != "every channel",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("conv", "dims", "tile"),
    [
        *((conv, (1, 2, 40, 72), None) for conv in CONVS),
        ("none", (2, 2, 16, 32), None),
        ("none", (2, 2, 16, 32), (16, 1, 1)),
        ("all static", (1, 2, 40, 72), (16, 1, 1)),
    ],
)
def test_delta_rule_of_a_step(
    dims: tuple[int, int, int, int],
    dtype: torch.dtype,
    conv: str,
    tile: tuple[int, int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decode: convolution, rule and gated norm in one launch, or with V split over programs."""
    if tile is not None:
        monkeypatch.setattr(triton_recurrent, "step_tile", lambda *_: tile)
    check_delta(dims, dtype, conv, DECODE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dims", "conv"), [((2, 2, 16, 32), "none"), ((1, 2, 40, 72), "low-rank")])
def test_delta_rule_of_longer_runs(
    dims: tuple[int, int, int, int], dtype: torch.dtype, conv: str
) -> None:
    check_delta(dims, dtype, conv, MIXED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dims", "depth", "runs"),
    [
        ((1, 2, 40, 72), 40, DECODE[1:3]),
        ((2, 2, 16, 32), 160, [(5, 1)]),
        ((2, 2, 16, 32), 160, DECODE * 2),
        ((2, 2, 16, 32), 16, MIXED),
    ],
)
def test_delta_rule_with_a_generator(
    dims: tuple[int, int, int, int], dtype: torch.dtype, depth: int, runs: list[tuple[int, int]]
) -> None:
    """A Jet layer: its filters made and applied in one launch for few sequences, or by a layer."""
    check_delta(dims, dtype, "every channel", runs, depth)


def check_delta(
    dims: tuple[int, int, int, int],
    dtype: torch.dtype,
    conv: str,
    runs: list[tuple[int, int]],
    depth: int = 0,
) -> None:
    """`depth`: inputs of a generator behind the code, if any."""
    torch.manual_seed(2)
    layout = make_layout(runs, padding_rows=3, padding_seqs=2)
    parts = delta_parts(*dims, dtype)
    _, heads, key_dim, value_dim = dims
    count, width = len(layout.batch.positions), sum(parts.widths)
    inner = heads * value_dim
    # One linear layer's output, as blocks hand it over: column slices of a wider tensor.
    filters, z_width = conv_of(conv, parts.widths, dtype)
    parts = replace(
        parts, silu=(conv in ("none", "values static", "every channel"), False, conv == "none")
    )
    if depth:
        weight = normal(z_width, depth, dtype=dtype) * depth**-0.5
        generator = PackedLinear(weight, normal(z_width, dtype=dtype), depth, z_width)
        parts, z_width = replace(parts, generator=generator), depth
    columns = normal(count, width + inner + 2 * heads + z_width, dtype=dtype)
    qkv, gate = columns[:, :width], columns[:, width : width + inner]
    b, a = columns[:, width + inner :][:, : 2 * heads].chunk(2, dim=1)
    z = columns[:, -z_width:] if z_width else None
    ring = None if filters is None else make_ring(layout, 4, filters.channels, dtype)
    state = make_state(layout, heads, key_dim, value_dim)
    truth_state, truth_ring = state.double(), None if ring is None else ring.double()
    live, batch = live_rows(layout), live_only(layout.batch)
    inputs = [x[:live].double() for x in (qkv, gate, b, a)]
    truth = REFERENCE.delta_rule(
        wide_parts(parts),
        inputs[0],
        None if z is None else z[:live].double(),
        None if filters is None else wide_filter(filters),
        truth_ring,
        inputs[1],
        inputs[2],
        inputs[3],
        truth_state,
        batch,
    )
    got = TRITON.delta_rule(parts, qkv, z, filters, ring, gate, b, a, state, layout.batch)
    assert got.dtype == dtype
    check(got[:live], truth, state, truth_state, is_rounded=filters is not None)
    if ring is not None and truth_ring is not None:
        assert torch.equal(nan_bits(ring), nan_bits(truth_ring))


@pytest.mark.parametrize("runs", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dims", [(4, 16, 2, 16), (3, 40, 1, 20)])
@pytest.mark.parametrize("conv", ["none", "static"])
def test_ssd(
    dims: tuple[int, int, int, int], dtype: torch.dtype, runs: list[tuple[int, int]], conv: str
) -> None:
    torch.manual_seed(3)
    heads, head_dim, groups, state_dim = dims
    layout = make_layout(runs, padding_rows=3, padding_seqs=2)
    inner = heads * head_dim
    parts = SSDParts(
        heads,
        head_dim,
        groups,
        state_dim,
        rate=-torch.rand(heads, device=DEVICE) * 2,
        dt_bias=normal(heads),
        skip=normal(heads),
        norm=normal(inner, dtype=dtype),
        eps=1e-5,
    )
    count, width = len(layout.batch.positions), sum(parts.widths)
    columns = normal(count, inner + width + heads + 3, dtype=dtype)
    gate, xbc = columns[:, :inner], columns[:, inner : inner + width]
    dt = columns[:, inner + width :][:, :heads]
    filters = ring = None
    if conv == "static":
        filters, _ = make_filter("static", 4, [(0, width)], silu=True, dtype=dtype)
        ring = make_ring(layout, 4, width, dtype)
    state = make_state(layout, heads, state_dim, head_dim)
    truth_state, truth_ring = state.double(), None if ring is None else ring.double()
    live, batch = live_rows(layout), live_only(layout.batch)
    inputs = [x[:live].double() for x in (xbc, gate, dt)]
    truth = REFERENCE.ssd(
        wide_parts(parts),
        inputs[0],
        None,
        None if filters is None else wide_filter(filters),
        truth_ring,
        inputs[1],
        inputs[2],
        truth_state,
        batch,
    )
    got = TRITON.ssd(parts, xbc, None, filters, ring, gate, dt, state, layout.batch)
    assert got.dtype == dtype
    if ring is not None and truth_ring is not None:
        assert torch.equal(nan_bits(ring), nan_bits(truth_ring))
    check(got[:live], truth, state, truth_state, is_rounded=filters is not None)


def check(got: Tensor, truth: Tensor, state: Tensor, truth_state: Tensor, is_rounded: bool) -> None:
    """Outputs, and every slot: those that are nobody's hold what they held.

    `is_rounded`: a launch of its own, before it, rounds what the recurrence reads.
    """
    assert torch.isfinite(truth).all()
    if is_rounded and got.dtype == torch.bfloat16:
        assert (got.double() - truth).norm() / truth.norm() < 1e-2
    else:
        assert_close(got, truth)
    left = torch.isnan(truth_state)
    assert torch.equal(torch.isnan(state), left)
    error = (state.double() - truth_state)[~left].norm() / truth_state[~left].norm()
    assert error < (1e-5 if got.dtype == torch.float32 else 1e-2 if is_rounded else 2e-3)


def test_repeated_keys_do_not_lose_precision() -> None:
    """A token said over and over, remembered in full: the hardest triangular system."""
    torch.manual_seed(4)
    layout = make_layout([(0, 48)])
    parts = replace(
        delta_parts(1, 1, 16, 16, torch.float32), rate=torch.full((1,), -1e-4, device=DEVICE)
    )
    qkv = normal(1, 48).expand(48, 48) + 1e-3 * normal(48, 48)
    gate, b = normal(48, 16), torch.full((48, 1), 8.0, device=DEVICE)
    state = make_state(layout, 1, 16, 16)
    truth_state = state.double()
    truth = REFERENCE.delta_rule(
        wide_parts(parts), qkv.double(), None, None, None, gate.double(), b.double(), b.double(),
        truth_state, layout.batch,
    )  # fmt: skip
    got = TRITON.delta_rule(parts, qkv, None, None, None, gate, b, b, state, layout.batch)
    slot = int(layout.batch.slots[0])
    error = (state[slot].double() - truth_state[slot]).norm() / truth_state[slot].norm()
    assert error < 1e-4
    assert (got.double() - truth).norm() / truth.norm() < 1e-4


@pytest.mark.parametrize("runs", [DECODE, [(5, 2), (0, 1), (1, 2)], MIXED], ids=len)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "channels", "has_bias"), [(3, 48, False), (4, 300, True)])
def test_gated_conv(
    width: int, channels: int, dtype: torch.dtype, runs: list[tuple[int, int]], has_bias: bool
) -> None:
    torch.manual_seed(5)
    layout = make_layout(runs, padding_rows=2, padding_seqs=1)
    filters = ConvFilter(
        "static",
        width,
        (Stream(0, channels, 0),),
        normal(width, channels),
        bias=normal(channels) if has_bias else None,
    )
    x = normal(len(layout.batch.positions), 3 * channels + 8, dtype=dtype)[:, : 3 * channels]
    ring = make_ring(layout, width, channels, dtype)
    # The ring holds rounded products; so does the reference's.
    rounded = ring.clone()
    live, batch = live_rows(layout), live_only(layout.batch)
    b, c, inner = (part[:live] for part in x.chunk(3, dim=1))
    product = (b * inner).double()
    truth_ring = rounded.double()
    truth = c.double() * REFERENCE.conv(product, None, wide_filter(filters), truth_ring, batch)
    got = TRITON.gated_conv(x, filters, ring, layout.batch)
    assert_close(got[:live], truth)
    torch.testing.assert_close(nan_bits(ring), nan_bits(truth_ring.to(dtype)), atol=1e-6, rtol=8e-3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="captures a CUDA graph")
@pytest.mark.parametrize("rows", [1, 20])
def test_a_captured_step_repeats_the_eager_one(rows: int) -> None:
    torch.manual_seed(6)
    layout = make_layout([(3 * i, rows) for i in range(5)], padding_rows=2, padding_seqs=1)
    parts = delta_parts(2, 4, 96, 128, torch.bfloat16)
    count = len(layout.batch.positions)
    qkv = normal(count, sum(parts.widths), dtype=torch.bfloat16)
    gate, b = normal(count, 512, dtype=torch.bfloat16), normal(count, 4, dtype=torch.bfloat16)
    first = make_state(layout, 4, 96, 128)
    eager_state, state = first.clone(), first.clone()
    eager = [
        TRITON.delta_rule(parts, qkv, None, None, None, gate, b, b, eager_state, layout.batch)
        for _ in "ab"
    ]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = TRITON.delta_rule(parts, qkv, None, None, None, gate, b, b, state, layout.batch)
    live = live_rows(layout)
    for truth, _ in itertools.product(eager, (0,)):
        graph.replay()
        assert torch.equal(captured[:live], truth[:live])
    assert torch.equal(nan_bits(state), nan_bits(eager_state))
