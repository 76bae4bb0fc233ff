"""The CPU's own ops against the reference in float64: a wrong row, page, ring slot or tail shows
here, before it becomes a wrong word on a machine without a GPU.

What a step may not read (pages and rings outside the live history) is NaN, and every native op is
run as compiled for this machine and, for people with older ones, as compiled for AVX2.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from convserve.kernels import ConvFilter, FlatBatch, Ops, QKNorm, Stream, native_build
from convserve.kernels.blocks import (
    AttentionParts,
    Convolved,
    MLPParts,
)
from convserve.kernels.cpu import CpuOps
from convserve.kernels.native_build import FLAGS, build, cache_folder, cpu_features
from convserve.kernels.native_ops import NativeOps, cpu_ops
from flat_batches import flat_batch, poisoned_ring
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

REFERENCE = Ops()
BF16 = torch.bfloat16
TARGETS = {"this machine": FLAGS, "avx2": (*FLAGS, "-march=haswell")}

STEPS = {
    "decode": [(0, 1), (1, 1), (2, 1), (70, 1)],
    "ragged": [(0, 3), (7, 1), (2, 2), (64, 5), (130, 3)],
    "chunk wraps the ring": [(3, 9), (0, 4), (11, 1), (2, 70)],
    "one": [(129, 1)],
}


@pytest.fixture(scope="module", params=TARGETS)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    if native_build.compiler() is None or not {"avx2", "fma"} <= cpu_features():
        pytest.skip("needs a C compiler and an x86 CPU with AVX2")
    return NativeOps(build(cache_folder(), TARGETS[request.param]))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(BF16)


def wide(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.double()


def assert_close(got: Tensor, truth: Tensor, bound: float = 4e-3) -> None:
    """Within a bfloat16 rounding or two of the float64 truth, element for element NaN alike."""
    assert got.shape == truth.shape
    assert torch.equal(got.isnan(), truth.isnan())
    error = (got.double() - truth).nan_to_num().norm() / truth.nan_to_num().norm()
    assert error < bound, f"relative error {error:.2e}"


def pages_for(batch: FlatBatch, heads: int, size: int, dim: int) -> Tensor:
    """Pages full of NaN but for the positions before this step."""
    pages = torch.full((int(batch.pages.max()) + 1, heads, size, dim), torch.nan, dtype=BF16)
    for s, start in enumerate(batch.starts.tolist()):
        for p in range(start):
            pages[batch.pages[s, p // size], :, p % size] = normal(heads, dim)
    return pages


def ring_for(batch: FlatBatch, width: int, channels: int) -> Tensor:
    """A ring full of NaN but for the window before each sequence's first row."""
    ring = poisoned_ring(batch, channels, BF16)
    for slot, start in zip(batch.slots.tolist(), batch.starts.tolist(), strict=True):
        for p in range(max(0, start - width + 1), start):
            ring[slot, p % batch.ring_len] = normal(channels)
    return ring


def make_filter(
    kind: Literal["static", "lowrank", "headwise"],
    parts: list[tuple[int, int]],
    *,
    width: int = 4,
    plain: bool = False,
) -> tuple[ConvFilter, int]:
    """A filter over streams at columns `parts`, and how many z columns it reads."""
    per_stream = {
        "static": lambda _: 0,
        "lowrank": lambda _: 5,
        "headwise": lambda n: n // 2 * width,
    }
    streams, z = [], 0
    for start, stop in parts:
        streams.append(Stream(start, stop, z))
        z += per_stream[kind](stop - start)
    channels = sum(stop - start for start, stop in parts)
    return ConvFilter(
        kind=kind,
        width=width,
        streams=tuple(streams),
        static=torch.randn(width, channels),
        up=normal(5, width, channels, scale=0.4) if kind == "lowrank" else None,
        head_size=2,
        bias=None if plain else torch.randn(channels),
        scale=1.0 if plain else 0.7,
        activation=None if plain else "silu",
    ), z


def wide_filter(filters: ConvFilter) -> ConvFilter:
    return replace(filters, static=filters.static.double(), up=wide(filters.up))


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 13, 30])
@pytest.mark.parametrize(("outputs", "inputs"), [(50, 34), (96, 576), (33, 2)])
def test_linear(ops: NativeOps, rows: int, outputs: int, inputs: int) -> None:
    x = normal(rows, inputs + 6)[:, 3 : 3 + inputs]
    weight, bias = normal(outputs, inputs), normal(outputs)
    for b in (None, bias):
        got = ops.linear(x, ops.pack_linear(weight, b))
        truth = torch.nn.functional.linear(x.double(), weight.double(), wide(b))
        assert_close(got, truth)


def test_a_row_of_a_linear_ignores_its_neighbours(ops: NativeOps) -> None:
    """Greedy text must not change with who else is being served."""
    x, packed = normal(40, 576), ops.pack_linear(normal(200, 576), None)
    together = ops.linear(x, packed)
    for rows in (1, 2, 5, 12, 13, 24):
        assert torch.equal(ops.linear(x[:rows], packed), together[:rows])


def test_threads_do_not_change_results(ops: NativeOps) -> None:
    x, packed = normal(9, 576), ops.pack_linear(normal(3000, 576), None)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 4, 2):
            torch.set_num_threads(count)
            results.append(ops.linear(x, packed))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_two_python_threads_share_the_team(ops: NativeOps) -> None:
    x, packed = normal(5, 576), ops.pack_linear(normal(3000, 576), None)
    want, wrong = ops.linear(x, packed), []

    def repeat() -> None:
        wrong.extend(i for i in range(200) if not torch.equal(ops.linear(x, packed), want))

    workers = [threading.Thread(target=repeat) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_packed_weights_give_their_rows_back(ops: NativeOps) -> None:
    """Tied models keep one table for embedding and logits."""
    table, ids = normal(70, 34), torch.tensor([0, 69, 16, 31, 16])
    assert torch.equal(ops.embed(ids, ops.pack_linear(table, None)), table[ids])
    assert torch.equal(ops.embed(ids, table), table[ids])


@pytest.mark.parametrize("width", [576, 50, 5])
@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32], ids=str)
def test_norms(ops: NativeOps, width: int, weight_dtype: torch.dtype) -> None:
    x, weight = normal(70, 3, width), torch.randn(width).to(weight_dtype)
    truth = REFERENCE.rms_norm(x.double(), weight.double(), 1e-5)
    assert_close(ops.rms_norm(x, weight, 1e-5), truth)
    x, residual = normal(70, width + 3)[:, 2 : width + 2], normal(70, width)
    y, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert_close(y, REFERENCE.rms_norm(total.double(), weight.double(), 1e-5))


@pytest.mark.parametrize("width", [1536, 21])
def test_silu_mul(ops: NativeOps, width: int) -> None:
    batch = flat_batch([(0, 9)])
    x = normal(9, 2 * width + 8, scale=9.0)[:, 5 : 5 + 2 * width]
    x[0, 0] = -300.0
    got = ops.conv_silu_mul(x, None, None, None, batch)
    assert_close(got, REFERENCE.conv_silu_mul(x.double(), None, None, None, batch))


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


def test_float32_is_the_reference(ops: NativeOps) -> None:
    """Greedy equality is promised in float32: that path has no kernels of its own."""
    batch = flat_batch(STEPS["ragged"], page_size=4)
    weight, x = torch.randn(20, 12), torch.randn(len(batch.positions), 12)
    packed = ops.pack_linear(weight, None)
    assert packed.weight is weight
    assert torch.equal(ops.linear(x, packed), torch.nn.functional.linear(x, weight))
    norm = torch.randn(12)
    assert torch.equal(ops.rms_norm(x, norm, 1e-5), REFERENCE.rms_norm(x, norm, 1e-5))
    silu = ops.conv_silu_mul(x, None, None, None, batch)
    assert torch.equal(silu, REFERENCE.conv_silu_mul(x, None, None, None, batch))


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_torch_linears(rows: int) -> None:
    """Machines without a compiler: oneDNN's layout, and nothing else of the weight is kept."""
    ops = CpuOps()
    x, weight, bias = normal(rows, 64), normal(50, 64), normal(50)
    for b in (None, bias):
        got = ops.linear(x, ops.pack_linear(weight, b))
        assert_close(got, torch.nn.functional.linear(x.double(), weight.double(), wide(b)))


def test_no_compiler_means_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    native_build.load.cache_clear()
    assert type(cpu_ops()) is CpuOps
    native_build.load.cache_clear()


def test_native_code_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVSERVE_NATIVE", "0")
    native_build.load.cache_clear()
    assert type(cpu_ops()) is CpuOps
    monkeypatch.setenv("CONVSERVE_NATIVE", "maybe")
    native_build.load.cache_clear()
    with pytest.raises(ValueError, match="CONVSERVE_NATIVE is 'maybe'; allowed are 0"):
        cpu_ops()
    native_build.load.cache_clear()


def test_a_failing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if native_build.compiler() is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(native_build, "SOURCES", tmp_path)
    (tmp_path / "broken.c").write_text("int f(void) { return nothing; }")
    with pytest.raises(OSError, match=r"could not compile the kernels: .*error"):
        build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_libraries_others_can_write_are_not_loaded(tmp_path: Path) -> None:
    """A planted library in a shared cache folder would run as the user who serves."""
    if native_build.compiler() is None:
        pytest.skip("needs a C compiler")
    tmp_path.chmod(0o777)
    build(tmp_path, (*FLAGS, "-O0"))
    assert not list(tmp_path.iterdir())
