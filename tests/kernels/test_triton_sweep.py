"""The whole sweep of shapes, on a GPU alone: interpreted, it would take an hour."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cases import DEVICE, make_filter, make_layout
from triton_checks import check_conv, check_qkv

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="hundreds of compilations")

DIMS = (48, 100, 576, 2048)
WIDTHS = (2, 3, 4, 5)
KINDS = (
    ("static", 0), *(("lowrank", rank) for rank in (1, 5, 15, 16, 64)),
    *(("headwise", size) for size in (1, 16, 64)),
)  # fmt: skip
LADDER = (1, 2, 4, 8, 16, 24)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_conv_of_every_shape(kind: str, size: int, dim: int, width: int) -> None:
    """Runs of 1, 2, W - 1, W, 63 and 130 rows from several positions, over two ring lengths."""
    if kind == "headwise" and dim % size:
        pytest.skip("heads that do not divide the channels")
    torch.manual_seed(1)
    dtype = (torch.float32, torch.bfloat16)[(dim + width + size) % 2]
    shape = {"rank": max(size, 1), "head_size": max(size, 1), "dtype": dtype}
    for rows, ring_len in itertools.product((1, 2, width - 1, width, 63, 130), (8, 256)):
        runs = [(0, rows), (1, rows), (width, 1), (17, rows)]
        layout = make_layout(runs, ring_len=ring_len, padding_rows=1)
        filters, z_width = make_filter(kind, width, [(0, dim)], **shape)
        check_conv(layout, filters, z_width, dtype, columns=dim)


@pytest.mark.parametrize("kind", ["none", "static", "lowrank", "headwise"])
@pytest.mark.parametrize(
    ("heads", "head_dim"), [((9, 3), 64), ((16, 16), 128), ((2, 1), 100), ((32, 8), 64)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qkv_of_every_shape(
    kind: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    for rows in (1, 3, 63, 130):
        layout = make_layout([(0, rows), (5, 1), (40, rows)], padding_rows=2, page_size=16)
        check_qkv(layout, kind, dtype, heads=heads, head_dim=head_dim, conv_head=4)


@pytest.mark.parametrize("padded", LADDER)
@pytest.mark.parametrize("kind", ["none", "lowrank", "headwise"])
def test_every_number_of_live_rows_in_a_padded_step(kind: str, padded: int) -> None:
    torch.manual_seed(3)
    for live in range(1, padded + 1):
        runs = [(s % 7, 1) for s in range(live)]
        layout = make_layout(runs, padding_rows=padded - live, padding_seqs=padded - live)
        check_qkv(layout, kind, torch.bfloat16, heads=(4, 2), head_dim=64, conv_head=16)
