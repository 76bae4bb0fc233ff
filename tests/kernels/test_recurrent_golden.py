"""The delta rule and the convolutions of Jet-Nemotron and Inkling-2 give their code's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convserve.kernels import ConvFilter, Ops, Stream
from convserve.kernels.reference_recurrent import recur
from flat_batches import flat_batch, poisoned_ring, read_ring
from golden import cases, tensors, tolerance
from torch import Tensor


def ids(kind: str) -> Any:
    return pytest.mark.parametrize("case", cases(kind), ids=lambda c: c["id"])


@pytest.mark.parametrize("chunk", [1, 2, 3, 1000])
@ids("op.gated_delta_rule")
def test_gated_delta_rule(case: dict[str, Any], chunk: int) -> None:
    """All sequences of the case in one flat batch, however it is cut."""
    t, params = tensors(case), case["params"]
    count, length = params["B"], params["T"]
    q, k, v, beta, g = (t[name] for name in ("q", "k", "v", "beta", "g"))
    start = 5 if "initial_state" in t else 0
    state = torch.full((count + 1, *t["final_state"].shape[1:]), torch.nan)
    slots = flat_batch([(start, 1)] * count).slots.long()
    if start:
        state[slots] = t["initial_state"]
    outs: list[Tensor] = []
    for at in range(0, length, chunk):
        rows = min(chunk, length - at)
        batch = flat_batch([(start + at, rows)] * count)
        part = slice(at, at + rows)
        now = [x[:, part].flatten(0, 1) for x in (q * params["K"] ** -0.5, k, v, g, beta)]
        o = recur(now[0], now[1], now[2], now[3], now[4], state, batch)
        outs.append(o.view(count, rows, *o.shape[1:]))
    torch.testing.assert_close(torch.cat(outs, 1), t["o"], **tolerance(case))
    torch.testing.assert_close(state[slots], t["final_state"], **tolerance(case))


@ids("op.jet_dynconv")
def test_jet_dynamic_convolution(case: dict[str, Any]) -> None:
    t, p = tensors(case), case["params"]
    width, channels, name = p["W"], p["D"], "kernel_generator"
    rows = t[f"{name}.w2.weight"].unflatten(0, (channels, width)).flip(1).flatten(0, 1)
    bias = t[f"{name}.w2.bias"].unflatten(0, (channels, width)).flip(1).flatten()
    z = F.linear(F.silu(t["generator_input"] @ t[f"{name}.w1.weight"].T), rows, bias)
    filters = ConvFilter(
        "headwise",
        width,
        (Stream(0, channels, 0),),
        torch.zeros(width, channels),
        head_size=1,
        activation=p["activation"],
    )
    parts = [(0, p["prefill"]), *((p["prefill"] + i, 1) for i in range(p["steps"]))]
    outs: list[Tensor] = []
    ring = None
    for start, count in parts:
        batch = flat_batch([(start, count)] * p["B"])
        ring = poisoned_ring(batch, channels) if ring is None else ring
        part = slice(start, start + count)
        x, code = (y[:, part].flatten(0, 1) for y in (t["x"], z))
        y = Ops().conv(x, code, filters, ring, batch)
        outs.append(y.view(p["B"], count, channels))
    torch.testing.assert_close(torch.cat(outs, 1), t["y"], **tolerance(case))
    end = p["prefill"] + p["steps"]
    assert ring is not None
    for b, slot in enumerate(flat_batch([(0, 1)] * p["B"]).slots.tolist()):
        window = read_ring(ring, slot, end, width)
        torch.testing.assert_close(window.T, t["cache_after_steps"][b])


@ids("op.inkling2_dynamic")
def test_inkling2_dynamic(case: dict[str, Any]) -> None:
    t, p = tensors(case), case["params"]
    static = t["static_weight"].clone()
    static[0] += 1
    filters = ConvFilter(
        "headwise",
        p["W"],
        (Stream(0, p["D"], 0),),
        static,
        head_size=p["head_size"],
        scale=(2 * p["W"] + 1) ** -0.5,
    )
    z = t["dynamic_input"] @ t["weight_proj.weight"].T
    check_inkling2(case, t, filters, z)


@ids("op.inkling2_static")
def test_inkling2_static(case: dict[str, Any]) -> None:
    t, p = tensors(case), case["params"]
    static = t["conv1d.weight"][:, 0].T.flip(0).contiguous()
    static[0] += 1
    filters = ConvFilter(
        "static", p["W"], (Stream(0, p["D"], 0),), static, scale=(p["W"] + 1) ** -0.5
    )
    check_inkling2(case, t, filters, None)


def check_inkling2(
    case: dict[str, Any], t: dict[str, Tensor], filters: ConvFilter, z: Tensor | None
) -> None:
    count, length = t["x"].shape[:2]
    batch = flat_batch([(0, length)] * count)
    code = None if z is None else z.flatten(0, 1)
    ring = poisoned_ring(batch, filters.channels)
    y = Ops().conv(t["x"].flatten(0, 1), code, filters, ring, batch)
    torch.testing.assert_close(y.view_as(t["y"]), t["y"], **tolerance(case))
