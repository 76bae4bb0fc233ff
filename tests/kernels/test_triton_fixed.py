"""The deterministic backend: right, and each row's bits the same whoever shares its step."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from convserve.kernels.ops import Ops, PackedLinear, QKNorm
from convserve.kernels.triton_fixed import FixedTritonOps, fixed_linear
from torch import Tensor
from triton_cases import assert_close, make_filter, make_layout, make_pages, make_ring, normal

FIXED, REFERENCE = FixedTritonOps(), Ops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_product_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight, bias = normal(70, 100, dtype=dtype), normal(48, 100, dtype=dtype), normal(48)
    bias = bias.to(dtype)
    whole = fixed_linear(x, weight, bias)
    assert_close(whole, x.double() @ weight.double().T + bias.double())
    for rows in (slice(0, 1), slice(69, 70), slice(3, 40)):
        assert torch.equal(fixed_linear(x[rows], weight, bias), whole[rows])
    packed = PackedLinear(weight, None, 100, 48)
    assert_close(FIXED.linear(x[:5], packed), x[:5].double() @ weight.double().T)


def test_a_rows_attention_does_not_depend_on_where_its_run_is_cut() -> None:
    """One run of 9 rows after 30 cached positions, and its last row as a step of its own."""
    heads, dim = 2, 32
    layout = make_layout([(30, 9), (5, 1)])
    k, v = (make_pages(layout, heads, dim, torch.float32) for _ in range(2))
    for s, position in [(0, p) for p in range(30, 39)] + [(1, 5)]:
        for cache in (k, v):
            page = layout.batch.pages[s, position // 16]
            cache[page, :, position % 16] = normal(heads, dim)
    q = normal(10, 4, dim)
    whole = FIXED.attention(q, k, v, layout.batch, dim**-0.5)
    assert_close(
        whole, REFERENCE.attention(q.double(), k.double(), v.double(), layout.batch, dim**-0.5)
    )
    alone = make_layout([(38, 1)]).batch
    alone.pages[0, :3] = layout.batch.pages[0, :3]
    assert torch.equal(FIXED.attention(q[8:9], k, v, alone, dim**-0.5), whole[8:9])


@pytest.mark.parametrize("kind", ["static", "lowrank", "headwise"])
def test_what_follows_a_convolution_does_not_depend_on_where_a_run_is_cut(kind: str) -> None:
    """A run of 9 rows in one step, and in steps of 5, 1 and 3 rows over the same ring."""
    width, dtype = 32, torch.float32
    filters, z_width = make_filter(kind, 4, [(0, width)], head_size=8)
    pair, pair_z = make_filter(kind, 4, [(0, width), (width, 2 * width)], head_size=8)
    x, gate_up = normal(9, width), normal(9, 2 * width)
    z, zz = normal(9, max(z_width, 1)), normal(9, max(pair_z, 1))
    residual, weight = normal(9, width), normal(width)
    first = make_layout([(30, 9)])
    rings = make_ring(first, 4, width, dtype), make_ring(first, 4, 2 * width, dtype)

    def run(ops: Ops, cuts: list[int], rings: tuple[Tensor, ...]) -> list[Tensor]:
        ring, pair_ring = (ring.clone() for ring in rings)
        parts: list[list[Tensor]] = []
        for start, stop in itertools.pairwise(cuts):
            rows, batch = slice(start, stop), make_layout([(30 + start, stop - start)]).batch
            batch.slots.copy_(first.batch.slots)
            parts.append(
                [
                    *ops.conv_add_rms_norm(
                        x[rows], z[rows], filters, ring, residual[rows], weight, 1e-5, batch
                    ),
                    ops.conv_silu_mul(gate_up[rows], zz[rows], pair, pair_ring, batch),
                ]
            )
        return [torch.cat(part) for part in zip(*parts, strict=True)]

    whole = run(FIXED, [0, 9], rings)
    for got, cut, truth in zip(
        whole, run(FIXED, [0, 5, 6, 9], rings), run(REFERENCE, [0, 9], rings), strict=True
    ):
        assert torch.equal(got, cut)
        assert_close(got, truth.double())


@pytest.mark.parametrize("order", [None, "conv_first", "norm_first"])
@pytest.mark.parametrize("kind", ["static", "lowrank", "headwise"])
def test_keys_and_values_do_not_depend_on_where_a_run_is_cut(kind: str, order: str | None) -> None:
    """q, k, v of a run of 9 rows, and of the same in steps of 5, 1 and 3 rows."""
    dim, dtype = 32, torch.float32
    filters, z_width = make_filter(kind, 4, [(0, 64), (64, 96), (96, 128)], head_size=8)
    norm = None
    if order is not None:
        norm = QKNorm("head", order, normal(dim), normal(dim), 1e-5)  # pyright: ignore[reportArgumentType]
    qkv, z, rope = normal(9, 128), normal(9, max(z_width, 1)), normal(9, dim)
    first = make_layout([(30, 9)])
    ring = make_ring(first, 4, 128, dtype)

    def run(ops: Ops, cuts: list[int]) -> list[Tensor]:
        own, pages = ring.clone(), torch.zeros(2, first.num_pages, 1, first.page_size, dim)
        pages = pages.to(ring.device)
        q: list[Tensor] = []
        for start, stop in itertools.pairwise(cuts):
            rows, batch = slice(start, stop), make_layout([(30 + start, stop - start)]).batch
            batch.slots.copy_(first.batch.slots)
            batch = replace(batch, kv_rows=first.batch.kv_rows[rows])
            q.append(
                ops.qkv_rope_write(
                    qkv[rows], z[rows], filters, own, norm, rope[rows], pages[0], pages[1], batch
                )
            )
        return [torch.cat(q), pages]

    whole = run(FIXED, [0, 9])
    for got, cut, truth in zip(
        whole, run(FIXED, [0, 5, 6, 9]), run(REFERENCE, [0, 9]), strict=True
    ):
        assert torch.equal(got, cut)
        assert_close(got, truth.double())
