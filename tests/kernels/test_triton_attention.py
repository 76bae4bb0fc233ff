"""Paged attention kernels against the reference in float64, over poisoned pages."""

from __future__ import annotations

import pytest
import torch
from convserve.kernels import Ops, tuning
from convserve.kernels.triton_attention import split
from convserve.kernels.triton_ops import TritonOps
from triton_cases import (
    DEVICE,
    Layout,
    assert_close,
    live_only,
    live_rows,
    make_layout,
    make_pages,
    normal,
)

REFERENCE, TRITON = Ops(), TritonOps()
ON_GPU = DEVICE.type == "cuda"
RUNS = {
    "decode": [(0, 1), (16, 1), (70, 1)],
    "verify": [(3, 4), (40, 1), (0, 3)],
    "chunks": [(20, 18), (33, 1), (0, 11)],
    **({"long": [(1000, 300), (0, 513), (4000, 1), (64, 64)],
        "many": [(i * 7, 1) for i in range(99)]}
       if ON_GPU else {}),
}  # fmt: skip


@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize("page_size", [16, 48, 256] if not ON_GPU else [16, 48, 64, 256])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_over_every_step_shape(runs: str, page_size: int, window: int | None) -> None:
    torch.manual_seed(1)
    layout = make_layout(RUNS[runs], page_size=page_size, padding_rows=2, padding_seqs=1)
    check(layout, (4, 2), 16, torch.float32, window)


@pytest.mark.parametrize(
    ("heads", "dim"),
    [
        ((1, 1), 20),
        ((6, 2), 32),
        *([((32, 8), 128), ((9, 3), 64), ((16, 1), 80)] if ON_GPU else []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_head_shapes(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    check(make_layout([(30, 1), (5, 12)]), heads, dim, dtype, None)
    check(make_layout([(30, 1), (5, 3)]), heads, dim, dtype, None)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
@pytest.mark.parametrize("window", [None, 21])
def test_every_number_of_splits_gives_the_same_answer(splits: int, window: int | None) -> None:
    torch.manual_seed(3)
    layout = make_layout([(0, 2), (100, 1), (63, 1), (31, 2)])
    k, v = filled_pages(layout, 1, 16, torch.float32)
    q = normal(6, 2, 16)
    truth = REFERENCE.attention(q.double(), k.double(), v.double(), layout.batch, 0.3, window)
    out = torch.full((6, 32), float("nan"), device=DEVICE)
    tile = tuning.SplitTile(16, splits, 4, 2)
    split(q, k, v, layout.batch, 0.3, window, out, 2, tile)
    assert_close(out, truth)


@pytest.mark.parametrize(
    ("splits", "window", "dim", "dtype"),
    [(1, None, 20, torch.bfloat16), (3, 21, 16, torch.float32), (8, None, 16, torch.float32)],
)
def test_a_single_query_meets_every_key_once(
    splits: int, window: int | None, dim: int, dtype: torch.dtype
) -> None:
    """Whatever the parts, the keys fetched ahead, and the tiles that a page cuts."""
    torch.manual_seed(4)
    layout = make_layout([(0, 1), (90, 1), (31, 1)], page_size=24, padding_seqs=1)
    k, v = filled_pages(layout, 2, dim, dtype)
    q = normal(3, 2, dim, dtype=dtype)
    live = live_only(layout.batch)
    truth = REFERENCE.attention(q.double(), k.double(), v.double(), live, 0.3, window)
    for keys, warps, ahead in ((4, 1, 1), (8, 2, 3), (2, 16, 1)):
        out = torch.full((3, 2 * dim), float("nan"), device=DEVICE, dtype=dtype)
        tile = tuning.DecodeTile(keys, splits, warps, ahead)
        split(q, k, v, layout.batch, 0.3, window, out, 1, tile)
        assert_close(out, truth)


def check(
    layout: Layout, heads: tuple[int, int], dim: int, dtype: torch.dtype, window: int | None
) -> None:
    k, v = filled_pages(layout, heads[1], dim, dtype)
    q = normal(len(layout.batch.positions), heads[0], dim, dtype=dtype)
    live = live_rows(layout)
    got = TRITON.attention(q, k, v, layout.batch, dim**-0.5, window)
    truth = REFERENCE.attention(
        q[:live].double(), k.double(), v.double(), live_only(layout.batch), dim**-0.5, window
    )
    assert_close(got[:live], truth)


def filled_pages(layout: Layout, heads: int, dim: int, dtype: torch.dtype):
    """K and V with this step's rows stored, NaN everywhere else."""
    pages = [make_pages(layout, heads, dim, dtype) for _ in range(2)]
    rows = layout.batch.kv_rows[layout.batch.kv_rows >= 0]
    for p in pages:
        size = layout.page_size
        p[rows // size, :, rows % size] = normal(len(rows), heads, dim, dtype=dtype)
    return pages
