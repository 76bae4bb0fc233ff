"""The deterministic backend: right, and each row's bits the same whoever shares its step."""

from __future__ import annotations

import pytest
import torch
from convserve.kernels.ops import Ops, PackedLinear
from convserve.kernels.triton_fixed import FixedTritonOps, fixed_linear
from triton_cases import assert_close, make_layout, make_pages, normal

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
