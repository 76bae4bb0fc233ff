"""The CPU's deterministic ops, the torch ones that stand in where native kernels do not: right, and
each row's bits the same whoever shares its step and wherever its run is cut."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from convserve.kernels import Ops, QKNorm, cpu_fixed, native_build, select_ops
from convserve.kernels.cpu_fixed import FixedCpuOps
from cpu_cases import BF16, REFERENCE, assert_close, make_filter, wide, wide_filter
from flat_batches import flat_batch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

F32 = torch.float32
DTYPES = pytest.mark.parametrize("dtype", [F32, BF16])
KINDS = pytest.mark.parametrize("kind", ["static", "lowrank", "headwise"])
Kind = Literal["static", "lowrank", "headwise"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape).to(dtype)


@DTYPES
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 4), (24, 1), (25, 63), (40, 96), (576, 1008)])
def test_a_rows_product_does_not_depend_on_the_others_or_on_its_place(
    dtype: torch.dtype, threads: int, inputs: int, outputs: int
) -> None:
    ops = FixedCpuOps()
    x, weight, bias = (normal(dtype, *s) for s in ((40, inputs), (outputs, inputs), (outputs,)))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for b in (None, bias):
            packed = ops.pack_linear(weight, b)
            whole = ops.linear(x, packed)
            assert_close(whole, torch.nn.functional.linear(x.double(), weight.double(), wide(b)))
            for rows in (slice(0, 1), slice(39, 40), slice(3, 20), slice(1, 40)):
                assert torch.equal(ops.linear(x[rows], packed), whole[rows])
    finally:
        torch.set_num_threads(before)


def test_a_machine_whose_products_depend_on_a_rows_place_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody is promised bits that this library does not give."""

    def uneven(x: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        return x @ weight.t() + torch.arange(len(x))[:, None]

    monkeypatch.setattr(cpu_fixed, "_rows_in_lanes", uneven)
    monkeypatch.setattr(cpu_fixed.F, "linear", uneven)
    ops = FixedCpuOps()
    with pytest.raises(RuntimeError, match=r"^deterministic: .*float32 products with a 3 x 5 "):
        ops.linear(torch.ones(2, 5), ops.pack_linear(torch.ones(3, 5), None))


@DTYPES
@KINDS
@pytest.mark.parametrize("order", [None, "conv_first", "norm_first"])
@pytest.mark.parametrize("mode", ["head", "full"])
def test_an_attention_blocks_ops_do_not_depend_on_where_a_run_is_cut(
    dtype: torch.dtype,
    kind: Kind,
    order: Literal["conv_first", "norm_first"] | None,
    mode: Literal["head", "full"],
) -> None:
    """q, k, v, pages, ring and what is attended, of 9 rows in one step and in 5, 1 and 3."""
    dim, start = 12, 6
    filters, z_width = make_filter(kind, [(0, 48), (48, 60), (60, 72)])
    filters = replace(filters, up=None if filters.up is None else filters.up.to(dtype))
    widths = (dim, dim) if mode == "head" else (4 * dim, dim)
    norm = wide_norm = None
    if order is not None:
        q_weight, k_weight = (normal(dtype, w) for w in widths)
        norm = QKNorm(mode, order, q_weight, k_weight, 1e-5)
        wide_norm = QKNorm(mode, order, q_weight.double(), k_weight.double(), 1e-5)
    whole = flat_batch([(start, 9)], page_size=4)
    qkv, z, rope = normal(dtype, 9, 72), normal(dtype, 9, max(z_width, 1)), torch.randn(9, dim)
    ring = normal(dtype, 2, 4, 72)
    pages = normal(dtype, 2, int(whole.pages.max()) + 1, 1, 4, dim)

    def run(ops: Ops, cuts: list[int], double: bool = False) -> list[Tensor]:
        own, (k, v) = ring.clone(), pages.clone()
        if double:
            own, k, v = own.double(), k.double(), v.double()
        parts: list[Tensor] = []
        for first, stop in itertools.pairwise(cuts):
            rows, count = slice(first, stop), stop - first
            batch = flat_batch([(start + first, count)], page_size=4)
            batch = replace(batch, pages=whole.pages, kv_rows=whole.kv_rows[rows])
            inputs = [t[rows].double() if double else t[rows] for t in (qkv, z, rope)]
            q = ops.qkv_rope_write(
                inputs[0],
                inputs[1],
                wide_filter(filters) if double else filters,
                own,
                wide_norm if double else norm,
                inputs[2],
                k,
                v,
                batch,
            )
            parts.append(ops.attention(q, k, v, batch, dim**-0.5, 7))
        return [torch.cat(parts), k, v, own]

    ops = FixedCpuOps()
    truth = run(REFERENCE, [0, 9], double=True)
    got = run(ops, [0, 9])
    for mine, cut, want in zip(got, run(ops, [0, 5, 6, 9]), truth, strict=True):
        assert torch.equal(mine, cut)
        assert_close(mine, want, 3e-2 if dtype == BF16 else 1e-5)


@DTYPES
def test_what_follows_a_linear_does_not_depend_on_the_other_rows(dtype: torch.dtype) -> None:
    """Norms, gates and experts. Widths at which torch ends its vector loops with scalar code."""
    ops, width = FixedCpuOps(), 37
    x, gates = normal(dtype, 33, width), normal(dtype, 33, 2 * width)
    residual, weight, router = normal(dtype, 33, width), normal(dtype, width), normal(dtype, 33, 5)
    up, down = normal(dtype, 5, 2 * width, width), normal(dtype, 5, width, width)
    batch = flat_batch([(0, 33)])

    def run(ops: Ops, rows: slice, double: bool = False) -> tuple[Tensor, ...]:
        def cast(t: Tensor) -> Tensor:
            return t.double() if double else t

        return (
            *ops.add_rms_norm(cast(x[rows]), cast(residual[rows]), cast(weight), 1e-5),
            ops.conv_silu_mul(cast(gates[rows]), None, None, None, batch),
            ops.sigmoid_mul(cast(x[rows]), cast(gates[rows][:, :1])),
            ops.moe(cast(x[rows]), cast(router[rows]), cast(up), cast(down), 2, True),
        )

    whole = run(ops, slice(0, 33))
    for got, want in zip(whole, run(REFERENCE, slice(0, 33), double=True), strict=True):
        assert_close(got, want, 2e-2 if dtype == BF16 else 1e-5)
    for rows in (slice(0, 1), slice(32, 33), slice(4, 23)):
        for got, want in zip(run(ops, rows), whole, strict=True):
            assert torch.equal(got, want[rows])


def test_a_rows_draw_does_not_depend_on_the_others() -> None:
    """More tokens than torch sums on one thread."""
    logits, temperature, top_p = 3 * torch.randn(5, 40_000), torch.rand(5) + 0.5, torch.rand(5)
    top_k, min_p, u = torch.zeros(5).int(), torch.zeros(5), torch.rand(5).double()
    ops = FixedCpuOps()

    def draw(rows: slice) -> Tensor:
        return ops.sample(
            logits[rows], temperature[rows], top_k[rows], top_p[rows], min_p[rows], u[rows]
        )

    ids = draw(slice(0, 5))
    for i in range(5):
        assert torch.equal(draw(slice(i, i + 1)), ids[i : i + 1])


def test_padding_rows_attend_to_nothing_and_an_empty_step_is_fine() -> None:
    ops, batch = FixedCpuOps(), flat_batch([(1, 1)], padding=2)
    k, v = torch.randn(3, 1, 4, 8), torch.randn(3, 1, 4, 8)
    out = ops.attention(torch.randn(3, 2, 8), k, v, batch, 1.0)
    assert not out[1:].any()
    packed = ops.pack_linear(torch.randn(6, 8), None)
    assert ops.linear(torch.empty(0, 8), packed).shape == (0, 6)


def test_a_cpu_gets_native_kernels_where_it_can_and_torch_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if native_build.load() is not None:
        ops = select_ops(torch.device("cpu"), "deterministic")
        assert isinstance(ops, FixedCpuOps)
        assert ops.name == "cpu-native, deterministic"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native_build.load.cache_clear()
    assert type(select_ops(torch.device("cpu"), "deterministic")) is FixedCpuOps
    native_build.load.cache_clear()
