# pyright: reportArgumentType=false
"""One op on one step, compared with the reference in float64: values, rings, pages, poison."""

from __future__ import annotations

from dataclasses import replace

import torch
from convserve.kernels import ConvFilter, Ops, QKNorm, tuning
from convserve.kernels.triton_conv import conv
from convserve.kernels.triton_qkv import qkv_rope_write
from triton_cases import (
    DEVICE,
    Layout,
    assert_close,
    live_only,
    live_rows,
    make_filter,
    make_pages,
    make_ring,
    nan_bits,
    normal,
    wide,
)

REFERENCE = Ops()


def check_conv(
    layout: Layout,
    filters: ConvFilter,
    z_width: int,
    dtype: torch.dtype,
    columns: int,
    tile: tuning.ConvTile | None = None,
) -> None:
    """The op on column slices of one wide tensor, against the reference in float64."""
    rows = len(layout.batch.positions)
    live = live_rows(layout)
    wide_rows = normal(rows, columns + z_width + 8, dtype=dtype)
    x, z = wide_rows[:, :columns], wide_rows[:, columns : columns + z_width]
    code = z if z_width else None
    ring = make_ring(layout, filters.width, filters.channels, dtype)
    truth_ring = ring.clone().double()
    truth = REFERENCE.conv(
        x[:live].double(), None if code is None else code[:live].double(), wide(filters),
        truth_ring, live_only(layout.batch),
    )  # fmt: skip
    got = conv(x, code, filters, ring, layout.batch, tile=tile)
    assert_close(got[:live], truth)
    assert torch.equal(nan_bits(ring), nan_bits(truth_ring.to(dtype)))


def check_qkv(
    layout: Layout,
    kind: str,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (2, 1),
    head_dim: int = 16,
    rotary: int | None = None,
    conv_head: int = 4,
    norm: tuple[str, str] | None = None,
    parts: tuple[int, ...] | str = (0, 1, 2),
    tile: tuning.ConvTile | None = None,
) -> None:
    """The op on column slices of one wide tensor, against the reference in float64."""
    rows, live = len(layout.batch.positions), live_rows(layout)
    q_heads, kv_heads = heads
    edges = [0, q_heads, q_heads + kv_heads, q_heads + 2 * kv_heads]
    columns = edges[3] * head_dim
    if parts == "one stream":
        spans = [(0, columns)]
    elif parts == "split inside k":
        spans = [(0, edges[1] * head_dim + 4), (edges[1] * head_dim + 4, columns)]
    else:
        spans = [(edges[i] * head_dim, edges[i + 1] * head_dim) for i in parts]  # pyright: ignore
    filters, z_width = (None, 0)
    if kind != "none":
        filters, z_width = make_filter(kind, 4, spans, head_size=conv_head, dtype=dtype)
    ring = make_ring(layout, 4, 1 if filters is None else filters.channels, dtype)
    both = normal(rows, columns + z_width + 8, dtype=dtype)
    x, z = both[:, :columns], both[:, columns : columns + z_width]
    rotary = head_dim if rotary is None else rotary
    angle = torch.rand(rows, rotary // 2) * 6
    rope = torch.cat((angle.cos(), angle.sin()), 1).to(DEVICE)
    k_pages, v_pages = (make_pages(layout, kv_heads, head_dim, dtype) for _ in range(2))
    qk_norm = wide_norm = None
    if norm is not None:
        widths = (head_dim,) * 2 if norm[0] == "head" else (q_heads * head_dim, kv_heads * head_dim)
        q_weight, k_weight = (normal(w, dtype=dtype) for w in widths)
        qk_norm = QKNorm(norm[0], norm[1], q_weight, k_weight, 1e-6)  # pyright: ignore
        wide_norm = replace(qk_norm, q=q_weight.double(), k=k_weight.double())
    truth_ring, truth_k, truth_v = ring.double(), k_pages.double(), v_pages.double()
    truth = REFERENCE.qkv_rope_write(
        x[:live].double(), z[:live].double() if z_width else None, wide(filters), truth_ring,
        wide_norm, rope[:live].double(), truth_k, truth_v, live_only(layout.batch),
    )  # fmt: skip
    got = qkv_rope_write(
        x, z if z_width else None, filters, ring, qk_norm, rope, k_pages, v_pages, layout.batch,
        tile,
    )  # fmt: skip
    assert got.is_contiguous()
    assert_close(got[:live], truth)
    for pages, true_pages in ((k_pages, truth_k), (v_pages, truth_v)):
        assert torch.equal(pages.isnan(), true_pages.isnan())
        assert_close(pages.nan_to_num(), true_pages.nan_to_num())
    if norm is None or norm[1] == "conv_first":
        assert torch.equal(nan_bits(ring), nan_bits(truth_ring.to(dtype)))
    else:
        # The ring holds normed rows: computed, so right to rounding.
        assert torch.equal(ring.isnan(), truth_ring.isnan())
        if filters is not None:
            assert_close(ring.nan_to_num(), truth_ring.nan_to_num())
