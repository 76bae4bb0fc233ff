"""The reference convolution gives the numbers of the paper's own code: whole sequences, decoding
step by step, ragged batches, and drafts taken back. A wrong tap order, a lost window or a
neighbour's row would make every dynamic-convolution model silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from convserve.kernels import ConvFilter, Ops, Stream
from flat_batches import fill_ring, flat_batch, poisoned_ring, read_ring
from golden import cases, tensors, tolerance
from torch import Tensor

OPS = Ops()


def filter_of(params: dict[str, Any], t: dict[str, Tensor]) -> ConvFilter:
    """The internal form of a case's filter."""
    channels, width = params["D"], params["W"]
    static = torch.zeros(width, channels)
    if "static_w" in t:
        static = t["static_w"].float().clone()
    if params["residual"]:
        static[0] += 1
    up = t["U"].view(-1, width, channels) if "U" in t else None
    kind = "lowrank" if up is not None else "headwise"
    size = params.get("head_size") or 0
    return ConvFilter(kind, width, (Stream(0, channels, 0),), static, up, head_size=size)


def code_of(t: dict[str, Tensor]) -> Tensor:
    """z [B, T, Z] of a case: the low-rank code, or head-wise weights, taps last."""
    return t["z"] if "z" in t else t["weight"].flatten(-2)


def run(
    x: Tensor, z: Tensor | None, filters: ConvFilter, ring: Tensor, lens: list[tuple[int, int]]
) -> Tensor:
    batch = flat_batch(lens, ring_len=ring.shape[1])
    return OPS.conv(x, z, filters, ring, batch)


def ids(kind: str) -> Any:
    return pytest.mark.parametrize("case", cases(kind), ids=lambda c: c["id"])


def check_full_sequences(case: dict[str, Any]) -> None:
    t, params = tensors(case), case["params"]
    filters, z = filter_of(params, t), code_of(t)
    count, length = t["x"].shape[:2]
    batch = flat_batch([(0, length)] * count)
    ring = poisoned_ring(batch, params["D"], t["x"].dtype)
    y = OPS.conv(t["x"].flatten(0, 1), z.flatten(0, 1), filters, ring, batch)
    torch.testing.assert_close(y.view_as(t["y"]), t["y"], **tolerance(case))


@ids("op.lowrank")
def test_lowrank_full_sequence(case: dict[str, Any]) -> None:
    check_full_sequences(case)


@ids("op.headwise")
def test_headwise_full_sequence(case: dict[str, Any]) -> None:
    check_full_sequences(case)


@ids("op.lowrank_module")
def test_lowrank_with_its_generator(case: dict[str, Any]) -> None:
    t, params = tensors(case), case["params"]
    static = t["proj_out_bias"].clone()
    if params["residual"]:
        static[0] += 1
    up = t["proj_out"].view(-1, params["W"], params["D"])
    filters = ConvFilter("lowrank", params["W"], (Stream(0, params["D"], 0),), static, up)
    batch = flat_batch([(0, params["T"])] * params["B"])
    z = t["pre_z"] @ t["proj_in.weight"].T
    ring = poisoned_ring(batch, params["D"])
    y = OPS.conv(t["x"].flatten(0, 1), z.flatten(0, 1), filters, ring, batch)
    torch.testing.assert_close(y.view_as(t["y"]), t["y"], **tolerance(case))


@ids("op.static")
def test_static_sequence_then_steps(case: dict[str, Any]) -> None:
    """causal_conv1d layout: x [B, D, T], weight [D, W] oldest first, then four single steps."""
    t, params = tensors(case), case["params"]
    width, channels = params["W"], params["D"]
    static = t["weight"].T.flip(0).float().contiguous()
    if params["residual"]:
        static[0] += 1
    activation = "silu" if params["activation"] in ("silu", "swish") else None
    filters = ConvFilter(
        "static",
        width,
        (Stream(0, channels, 0),),
        static,
        bias=t.get("bias"),
        activation=activation,
    )
    start = width - 1 if "initial_state" in t else 0
    length = params["T"]
    for b in range(params["B"]):
        ring = torch.full((2, 8, channels), torch.nan)
        if start:
            fill_ring(ring, 1, start, t["initial_state"][b].T)
        y = run(t["x"][b].T, None, filters, ring, [(start, length)])
        torch.testing.assert_close(y.T, t["y"][b], **tolerance(case))
        end = start + length
        torch.testing.assert_close(read_ring(ring, 1, end, width - 1).T, t["final_state"][b])
        for i in range(t["x_steps"].shape[2]):
            y = run(t["x_steps"][b, :, i][None], None, filters, ring, [(end + i, 1)])
            torch.testing.assert_close(y[0], t["y_steps"][b, :, i], **tolerance(case))
        end += t["x_steps"].shape[2]
        torch.testing.assert_close(read_ring(ring, 1, end, width - 1).T, t["state_after_steps"][b])


@ids("op.decode")
def test_decode_continues_a_prefill(case: dict[str, Any]) -> None:
    t, params = tensors(case), case["params"]
    filters, z, prefill = filter_of(params, t), code_of(t), params["prefill"]
    for b in range(params["B"]):
        ring = torch.full((2, 8, params["D"]), torch.nan)
        x, code = t["x"][b], z[b]
        parts = [run(x[:prefill], code[:prefill], filters, ring, [(0, prefill)])]
        state = read_ring(ring, 1, prefill, params["W"] - 1).T
        torch.testing.assert_close(state, t["state_at_prefill"][b])
        for p in range(prefill, params["T"]):
            parts.append(run(x[p : p + 1], code[p : p + 1], filters, ring, [(p, 1)]))
        torch.testing.assert_close(torch.cat(parts), t["y"][b], **tolerance(case))
        state = read_ring(ring, 1, params["T"], params["W"] - 1).T
        torch.testing.assert_close(state, t["state_at_end"][b])


@ids("op.packed")
def test_one_step_of_many_sequences(case: dict[str, Any]) -> None:
    t, params = tensors(case), case["params"]
    lens = [(context, new) for context, new in params["lens"]]
    filters, width = filter_of(params, t), params["W"]
    batch = flat_batch(lens, seed=3)
    ring = poisoned_ring(batch, params["D"])
    for s, (context, _) in enumerate(lens):
        fill_ring(ring, int(batch.slots[s]), context, t["initial_state"][s].T)
    z = t["z"] if "z" in t else t["weight"].flatten(1)
    y = OPS.conv(t["x"], z, filters, ring, batch)
    torch.testing.assert_close(y, t["y"], **tolerance(case))
    for s, (context, new) in enumerate(lens):
        state = read_ring(ring, int(batch.slots[s]), context + new, width - 1).T
        torch.testing.assert_close(state, t["final_state"][s])


@ids("op.rollback")
def test_rejected_drafts_leave_no_trace(case: dict[str, Any]) -> None:
    """All drafts run in one step; taking some back is reading the ring at a smaller position."""
    t, params = tensors(case), case["params"]
    context, drafted, accepted = params["context"], params["drafted"], params["accepted"]
    filters, width = filter_of(params, t), params["W"]
    ring = torch.full((2, 16, params["D"]), torch.nan)
    fill_ring(ring, 1, context, t["initial_state"].T)
    z = t["z"] if "z" in t else t["weight"].flatten(1)
    y = run(t["x"], z, filters, ring, [(context, drafted)])
    torch.testing.assert_close(y, t["y"], **tolerance(case))
    after_all = read_ring(ring, 1, context + drafted, width - 1).T
    torch.testing.assert_close(after_all, t["state_after_all"])
    after_accepted = read_ring(ring, 1, context + accepted, width - 1).T
    torch.testing.assert_close(after_accepted, t["state_after_accepted"])
