"""Experts: whatever the router decides, without the host knowing, each row gets its own sum."""

from __future__ import annotations

import pytest
import torch
from convserve.kernels import Ops, tuning
from convserve.kernels.triton_fixed import FixedTritonOps
from convserve.kernels.triton_moe import moe
from convserve.kernels.triton_ops import TritonOps
from triton_cases import DEVICE, assert_close, normal

REFERENCE, TRITON = Ops(), TritonOps()
ON_GPU = DEVICE.type == "cuda"


def check(
    rows: int,
    experts: int,
    top_k: int,
    *,
    width: int = 48,
    inner: int = 40,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
    lean: float = 0.0,
    tile: tuning.ExpertTile | None = None,
) -> None:
    """`lean` pulls rows to the first experts."""
    torch.manual_seed(1)
    x = normal(rows, width + 8, dtype=dtype)[:, :width]
    logits = normal(rows, experts) - lean * torch.arange(experts, device=DEVICE)
    gate_up = (torch.randn(experts, 2 * inner, width) / width**0.5).to(DEVICE, dtype)
    down = (torch.randn(experts, width, inner) / inner**0.5).to(DEVICE, dtype)
    got = moe(x, logits, gate_up, down, top_k, normalize, tile)
    truth = REFERENCE.moe(
        x.double(), logits.double(), gate_up.double(), down.double(), top_k, normalize
    )
    if dtype == torch.float32:
        assert_close(got, truth)
    else:
        # Three roundings: the hidden layer's, each expert's, the sum's.
        error = (got.double() - truth).norm() / truth.norm()
        assert error < (4e-3 if ON_GPU else 1.4e-2)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("rows", "experts", "top_k"), [(1, 8, 2), (5, 4, 4), (21, 6, 1), (40, 3, 2), (3, 60, 5)]
)
def test_rows_meet_their_experts(rows: int, experts: int, top_k: int, normalize: bool) -> None:
    check(rows, experts, top_k, normalize=normalize)


@pytest.mark.parametrize("lean", [2.0, 50.0])
def test_an_expert_may_have_every_row_or_none(lean: float) -> None:
    """More pairs than a block holds, next to experts with no pair at all."""
    check(50, 8, 2, lean=lean)
    check(33, 8, 1, lean=lean, tile=tuning.ExpertTile(16, 16, 16, 4, 2))


@pytest.mark.parametrize("rows", [2, 70] if not ON_GPU else [2, 70, 700])
def test_experts_in_bfloat16(rows: int) -> None:
    width, inner = (576, 200) if ON_GPU else (48, 40)
    for tile in (None, tuning.ExpertTile(64, 128, 64, 8, 3)):
        check(rows, 4, 2, width=width, inner=inner, dtype=torch.bfloat16, tile=tile)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    """Rows of padding or of other clients, broken ones too."""
    torch.manual_seed(2)
    x, logits = normal(9, 48), normal(9, 8)
    weights = normal(8, 32, 48), normal(8, 48, 16)
    alone = TRITON.moe(x[:4], logits[:4], *weights, 2, True)
    x[4:], logits[5:] = float("nan"), float("nan")
    beside = TRITON.moe(x, logits, *weights, 2, True)
    assert torch.equal(beside[:4], alone)
    assert beside[5:].isnan().all()


def test_deterministic_experts_give_a_row_the_same_bits_in_every_batch() -> None:
    """Few rows and many take different tiles otherwise."""
    torch.manual_seed(4)
    ops, dtype = FixedTritonOps(), torch.bfloat16
    x, logits = normal(70, 272, dtype=dtype), normal(70, 2)
    weights = normal(2, 64, 272, dtype=dtype) / 16, normal(2, 272, 32, dtype=dtype) / 5
    many = ops.moe(x, logits, *weights, 1, True)
    assert torch.equal(ops.moe(x[:3], logits[:3], *weights, 1, True), many[:3])


@pytest.mark.skipif(not ON_GPU, reason="captures a CUDA graph")
def test_a_captured_mixture_follows_new_routes() -> None:
    torch.manual_seed(3)
    x, logits = normal(16, 256, dtype=torch.bfloat16), normal(16, 8)
    weights = (normal(8, 128, 256, dtype=torch.bfloat16), normal(8, 256, 64, dtype=torch.bfloat16))
    TRITON.moe(x, logits, *weights, 2, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = TRITON.moe(x, logits, *weights, 2, True)
    for _ in range(3):
        logits.copy_(normal(16, 8))
        x.copy_(normal(16, 256, dtype=torch.bfloat16))
        graph.replay()
        assert torch.equal(captured, TRITON.moe(x, logits, *weights, 2, True))
