"""The CPU's own ops on single rows against the reference in float64: a linear, a norm or an
activation that is wrong shows here, before it becomes a wrong word on a machine without a GPU.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
from convserve.kernels.cpu import CpuOps
from cpu_cases import BF16, REFERENCE, STEPS, assert_close, normal, wide
from flat_batches import flat_batch

if TYPE_CHECKING:
    from convserve.kernels.native_ops import NativeOps


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
