"""The CPU's own ops against the reference in float64: a wrong row, page, ring slot or tail shows
here, before it becomes a wrong word on a machine without a GPU.

What a step may not read (pages and rings outside the live history) is NaN, and every native op is
run as compiled for this machine and, for people with older ones, as compiled for AVX2.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from convserve.kernels import ConvFilter, Ops, QKNorm
from convserve.kernels.blocks import AttentionParts, Convolved, MLPParts
from cpu_cases import (
    REFERENCE,
    STEPS,
    assert_close,
    make_filter,
    normal,
    pages_for,
    ring_for,
    wide,
    wide_filter,
)
from flat_batches import flat_batch

if TYPE_CHECKING:
    from convserve.kernels.native_ops import NativeOps


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["static", "lowrank", "headwise"])
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(("parts", "width"), [([(0, 40), (50, 56)], 4), ([(0, 70)], 2)])
def test_conv(
    ops: NativeOps,
    step: str,
    kind: Literal["static", "lowrank", "headwise"],
    plain: bool,
    parts: list[tuple[int, int]],
    width: int,
) -> None:
    """Streams over part of a column slice; the channels between them pass through."""
    batch = flat_batch(STEPS[step])
    filters, z_width = make_filter(kind, parts, width=width, plain=plain)
    x = normal(len(batch.positions), 80)[:, 4:74]
    z = normal(len(x), z_width) if z_width else None
    ring = ring_for(batch, width, filters.channels)
    expected_ring = ring.double()
    truth = REFERENCE.conv(x.double(), wide(z), wide_filter(filters), expected_ring, batch)
    assert_close(ops.conv(x, z, filters, ring, batch), truth)
    assert torch.equal(ring.double().nan_to_num(9e9), expected_ring.nan_to_num(9e9))


def test_conv_of_padding_rows_writes_no_ring(ops: NativeOps) -> None:
    batch = flat_batch([(5, 1), (3, 1)], padding=3)
    filters, _ = make_filter("static", [(0, 40)])
    ring = ring_for(batch, 4, 40)
    before = ring.clone()
    y = ops.conv(normal(5, 40), None, filters, ring, batch)
    assert not y.isnan().any()
    written = (ring.nan_to_num(9e9) != before.nan_to_num(9e9)).any(-1).flatten().nonzero()
    assert sorted(written[:, 0].tolist()) == sorted(batch.ring_rows[:2].tolist())


NORMS = [None, *((m, o) for m in ("head", "full") for o in ("conv_first", "norm_first"))]


@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim", "rot"), [(9, 3, 64, 64), (2, 2, 20, 12)])
def test_qkv_rope_write(
    ops: NativeOps,
    norm: tuple[Literal["head", "full"], Literal["conv_first", "norm_first"]] | None,
    convolved: bool,
    q_heads: int,
    kv_heads: int,
    dim: int,
    rot: int,
) -> None:
    batch = flat_batch(STEPS["ragged"], page_size=4)
    rows, width = len(batch.positions), (q_heads + 2 * kv_heads) * dim
    qk_norm = wide_norm = None
    if norm is not None:
        widths = (dim, dim) if norm[0] == "head" else (q_heads * dim, kv_heads * dim)
        q_weight, k_weight = (normal(w) for w in widths)
        qk_norm = QKNorm(*norm, q_weight, k_weight, 1e-6)
        wide_norm = QKNorm(*norm, q_weight.double(), k_weight.double(), 1e-6)
    filters = ring = wide_filters = wide_ring = None
    if convolved:
        filters, _ = make_filter("static", [(0, width)], plain=True)
        ring = ring_for(batch, 4, width)
        wide_filters, wide_ring = wide_filter(filters), ring.double()
    qkv, rope = normal(rows, width + 8)[:, 3 : width + 3], torch.randn(rows, rot)
    k_pages, v_pages = (pages_for(batch, kv_heads, 4, dim) for _ in range(2))
    wide_pages = k_pages.double(), v_pages.double()
    truth = REFERENCE.qkv_rope_write(
        qkv.double(), None, wide_filters, wide_ring, wide_norm, rope.double(), *wide_pages, batch
    )
    q = ops.qkv_rope_write(qkv, None, filters, ring, qk_norm, rope, k_pages, v_pages, batch)
    for got, want in zip((q, k_pages, v_pages), (truth, *wide_pages), strict=True):
        assert_close(got, want, 6e-3)


HEADS = [(9, 3, 64), (4, 4, 16), (8, 1, 80), (2, 1, 128)]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("window", [None, 5, 66])
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), HEADS)
@pytest.mark.parametrize("page_size", [1, 16])
def test_attention(
    ops: NativeOps,
    step: str,
    window: int | None,
    q_heads: int,
    kv_heads: int,
    dim: int,
    page_size: int,
) -> None:
    batch = flat_batch(STEPS[step], page_size=page_size)
    context = [(start + rows, 0) for start, rows in STEPS[step]]
    full = replace(batch, starts=torch.tensor([c for c, _ in context], dtype=torch.int32))
    k_pages, v_pages = (pages_for(full, kv_heads, page_size, dim) for _ in range(2))
    if window is not None:
        # Pages that no row can see any more may have been given to somebody else.
        for s, start in enumerate(batch.starts.tolist()):
            for p in range(max(0, start + 1 - window)):
                k_pages[batch.pages[s, p // page_size], :, p % page_size] = torch.nan
                v_pages[batch.pages[s, p // page_size], :, p % page_size] = torch.nan
    q = normal(len(batch.positions), q_heads, dim)
    got = ops.attention(q, k_pages, v_pages, batch, dim**-0.5, window)
    truth = REFERENCE.attention(
        q.double(),
        k_pages.double().nan_to_num(),
        v_pages.double().nan_to_num(),
        batch,
        dim**-0.5,
        window,
    )
    assert_close(got, truth)


@pytest.mark.parametrize("window", [None, 21])
def test_attention_does_not_depend_on_chunks(ops: NativeOps, window: int | None) -> None:
    """A prompt cut elsewhere gives the same bits."""
    whole = flat_batch([(0, 150)], page_size=16)
    full = replace(whole, starts=torch.tensor([150], dtype=torch.int32))
    pages = pages_for(full, 3, 16, 64), pages_for(full, 3, 16, 64)
    q = normal(150, 9, 64)
    want = ops.attention(q, *pages, whole, 0.125, window)
    for start, rows in [(0, 1), (149, 1), (40, 7), (63, 66)]:
        part = flat_batch([(start, rows)], page_size=16)
        part = replace(part, pages=whole.pages)
        got = ops.attention(q[start : start + rows], *pages, part, 0.125, window)
        assert torch.equal(got, want[start : start + rows])


def test_attention_of_padding_rows_is_zero(ops: NativeOps) -> None:
    batch = flat_batch([(5, 1)], page_size=4, padding=2)
    full = replace(batch, starts=batch.starts + 1)
    pages = pages_for(full, 1, 4, 16), pages_for(full, 1, 4, 16)
    out = ops.attention(normal(3, 2, 16), *pages, batch, 0.25)
    assert not out[1:].any()


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("from_input", [False, True])
@pytest.mark.parametrize("mode", [None, "head", "full"])
def test_a_block_is_its_chain_of_ops(
    ops: NativeOps,
    step: str,
    convolved: bool,
    from_input: bool,
    mode: Literal["head", "full"] | None,
) -> None:
    """One call and nine give the same bits, pages and rings included."""
    hidden, q_heads, kv_heads, dim, inner = 48, 4, 2, 16, 56
    widths = {
        "qkv": (q_heads + 2 * kv_heads) * dim,
        "o": hidden,
        "gate_up": 2 * inner,
        "down": hidden,
    }
    batch = flat_batch(STEPS[step], page_size=16)
    sites: dict[str, tuple[ConvFilter | None, int]] = dict.fromkeys(widths, (None, 0))
    if convolved:
        for name, width in widths.items():
            sites[name] = make_filter("lowrank", [(0, width // 2)], plain=True)
    rings = {
        name: ring_for(batch, 4, filters.channels)
        for name, (filters, _) in sites.items()
        if filters is not None
    }

    def pair(first: str, second: str, inputs: int) -> tuple[Convolved, int, Convolved, int]:
        z1, z2 = sites[first][1], sites[second][1]
        start = widths[first] + z1 if from_input else widths[second]
        outputs = widths[first] + z1 + from_input * z2, widths[second] + (not from_input) * z2
        return (
            Convolved(sites[first][0], slice(widths[first], widths[first] + z1)),
            outputs[0],
            Convolved(sites[second][0], slice(start, start + z2)),
            outputs[1],
        )

    def linear(outputs: int, inputs: int):
        return ops.pack_linear(normal(outputs, inputs, scale=inputs**-0.5), normal(outputs))

    qkv_conv, qkv, o_conv, o = pair("qkv", "o", hidden)
    gate_up_conv, gate_up, down_conv, down = pair("gate_up", "down", hidden)
    norm_width = {"head": (dim, dim), "full": (q_heads * dim, kv_heads * dim)}
    qk_norm = None
    if mode is not None:
        q_norm, k_norm = (normal(w) for w in norm_width[mode])
        qk_norm = QKNorm(mode, "conv_first", q_norm, k_norm, 1e-6)
    attention = AttentionParts(
        linear(qkv, hidden),
        qkv_conv,
        linear(o, q_heads * dim),
        o_conv,
        from_input,
        q_heads,
        kv_heads,
        dim,
        qk_norm,
        40,
    )
    mlp = MLPParts(
        linear(gate_up, hidden), gate_up_conv, linear(down, inner), down_conv, from_input, inner
    )
    x, residual = normal(len(batch.positions), hidden), normal(len(batch.positions), hidden)
    norm, rope = normal(hidden), torch.randn(len(x), dim)
    pages = pages_for(batch, kv_heads, 16, dim), pages_for(batch, kv_heads, 16, dim)
    other_pages = pages[0].clone(), pages[1].clone()
    other_rings = {name: ring.clone() for name, ring in rings.items()}

    want = Ops.attention_block(
        ops, attention, x, residual, norm, 1e-5, rope, *other_pages, other_rings, batch
    )
    got = ops.attention_block(attention, x, residual, norm, 1e-5, rope, *pages, rings, batch)
    assert all(map(torch.equal, got, want))
    want = Ops.mlp_block(ops, mlp, *want, norm, 1e-5, other_rings, batch)
    got = ops.mlp_block(mlp, *got, norm, 1e-5, rings, batch)
    assert all(map(torch.equal, got, want))
    assert not got[0].isnan().any()
    for mine, other in zip(
        (*pages, *rings.values()), (*other_pages, *other_rings.values()), strict=True
    ):
        assert torch.equal(mine.nan_to_num(9e9), other.nan_to_num(9e9))
