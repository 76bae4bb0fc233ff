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

CHUNKS = [1, 2, 3, 4, 5, 1000]
"""Up to one row more than the filters have taps; and whole."""


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


@pytest.mark.parametrize("chunk", CHUNKS)
@ids("op.jet_dynconv")
def test_jet_dynamic_convolution(case: dict[str, Any], chunk: int) -> None:
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
    y, ring = convolved(t["x"], z, filters, chunk)
    torch.testing.assert_close(y, t["y"], **tolerance(case))
    end = p["prefill"] + p["steps"]
    for b, slot in enumerate(flat_batch([(0, 1)] * p["B"]).slots.tolist()):
        window = read_ring(ring, slot, end, width)
        torch.testing.assert_close(window.T, t["cache_after_steps"][b])


@pytest.mark.parametrize("chunk", CHUNKS)
@ids("op.inkling2_dynamic")
def test_inkling2_dynamic(case: dict[str, Any], chunk: int) -> None:
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
    y, _ = convolved(t["x"], z, filters, chunk)
    torch.testing.assert_close(y, t["y"], **tolerance(case))


@pytest.mark.parametrize("chunk", CHUNKS)
@ids("op.inkling2_static")
def test_inkling2_static(case: dict[str, Any], chunk: int) -> None:
    t, p = tensors(case), case["params"]
    static = t["conv1d.weight"][:, 0].T.flip(0).contiguous()
    static[0] += 1
    filters = ConvFilter(
        "static", p["W"], (Stream(0, p["D"], 0),), static, scale=(p["W"] + 1) ** -0.5
    )
    y, _ = convolved(t["x"], None, filters, chunk)
    torch.testing.assert_close(y, t["y"], **tolerance(case))


def convolved(
    x: Tensor, z: Tensor | None, filters: ConvFilter, chunk: int
) -> tuple[Tensor, Tensor]:
    """x [B, T, D] as B sequences of one flat batch, `chunk` rows at a time -> (y, ring)."""
    count, length, channels = x.shape
    outs: list[Tensor] = []
    ring = None
    for start in range(0, length, chunk):
        rows = min(chunk, length - start)
        batch = flat_batch([(start, rows)] * count)
        ring = poisoned_ring(batch, channels) if ring is None else ring
        part = slice(start, start + rows)
        code = None if z is None else z[:, part].flatten(0, 1)
        y = Ops().conv(x[:, part].flatten(0, 1), code, filters, ring, batch)
        outs.append(y.view(count, rows, channels))
    assert ring is not None
    return torch.cat(outs, 1), ring
