# Triton's kernel language is not Python's: constexpr arguments, launch options, static ranges.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportReturnType=false, reportAssignmentType=false
"""One token of a linear recurrence: convolution, SiLU, norms of q and k, the state once in and once
out, and the gated norm, in one launch.

Generated filters are head-wise (Jet-Nemotron's: every channel its own) or absent; low-rank ones are
applied by the convolution's own kernel before this one. Knows nothing of longer runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_launch import start_next, wait_previous

INDICES = ["starts", "offsets", "slots", "ring_rows", "positions", "row_seq"]
"""Pointers into a step's packed indices, aligned as it happens: no reason for another kernel."""


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def softplus(x):
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@triton.jit
def vectors(line, column, mask, SILU: tl.constexpr):
    """Some channels of some rows, in float32."""
    x = tl.load(line + column, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        x = silu(x)
    return x


@triton.jit
def recall(
    channel,
    mask,
    static,
    ring,
    ring_stride,
    ring_row,
    position,
    WHICH: tl.constexpr,
    CONV: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """What the convolution of q, k or v takes from earlier steps: its W static taps, and then its
    W - 1 past inputs, the latest first."""
    known = (channel,)
    if STREAMS[WHICH][0] >= 0:
        W: tl.constexpr = CONV[1]
        D: tl.constexpr = CONV[2]
        RING: tl.constexpr = CONV[3]
        covered = STREAMS[WHICH][0] + channel
        slot_row = ring_row - (ring_row & (RING - 1))
        known = ()
        for w in tl.static_range(W):
            known = known + (tl.load(static + w * D + covered, mask=mask, other=0.0),)
        for w in tl.static_range(1, W):
            there = ring + (slot_row + ((position - w) & (RING - 1))) * ring_stride + covered
            past = tl.load(there, mask=mask & (position >= w), other=0.0)
            known = known + (past.to(tl.float32),)
    return known


@triton.jit
def stream(
    line,
    channel,
    mask,
    known,
    code,
    bias,
    WHICH: tl.constexpr,
    SILU: tl.constexpr,
    CONV: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """Some channels of one row's q, k or v -> (float32 after its convolution, if any; raw).

    known: see `recall`. code: the row's z.
    """
    now = tl.load(line + channel, mask=mask, other=0.0)
    if STREAMS[WHICH][0] < 0:
        y = now.to(tl.float32)
        if SILU:
            y = silu(y)
    else:
        KIND: tl.constexpr = CONV[0]
        W: tl.constexpr = CONV[1]
        taps = code + STREAMS[WHICH][1] + (channel // CONV[4]) * W
        y = tl.zeros(channel.shape, tl.float32)
        if CONV[5]:
            y += tl.load(bias + STREAMS[WHICH][0] + channel, mask=mask, other=0.0)
        for w in tl.static_range(W):
            f = known[w]
            if KIND == "headwise":
                f += tl.load(taps + w, mask=mask, other=0.0).to(tl.float32)
            if w == 0:
                y += f * now.to(tl.float32)
            else:
                y += f * known[W - 1 + w]
        y = silu(y)
    return y, now


@triton.jit
def keep(
    now,
    channel,
    mask,
    ring,
    ring_stride,
    ring_row,
    WHICH: tl.constexpr,
    STREAMS: tl.constexpr,
):
    """Stores a stream's raw input in the ring: no row that is read in this step is written in it.

    Called after every load, because none is moved above a store.
    """
    if STREAMS[WHICH][0] >= 0:
        tl.store(ring + ring_row * ring_stride + STREAMS[WHICH][0] + channel, now, mask=mask)


@triton.jit(do_not_specialize_on_alignment=INDICES)
def step_kernel(
    x,
    x_stride,
    z,
    z_stride,
    static,
    bias,
    ring,
    ring_stride,
    ring_rows,
    gate,
    gate_stride,
    b,
    b_stride,
    a,
    a_stride,
    rate,
    dt_bias,
    skip,
    norm,
    state,
    out,
    starts,
    offsets,
    slots,
    Q_AT: tl.constexpr,
    K_AT: tl.constexpr,
    V_AT: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    DELTA: tl.constexpr,
    SILU_Q: tl.constexpr,
    SILU_K: tl.constexpr,
    SILU_V: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    KP: tl.constexpr,
    N: tl.constexpr,
    BLOCKS: tl.constexpr,
    FUSED: tl.constexpr,
    CONV: tl.constexpr,
    STREAMS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of a sequence, one head, BLOCKS blocks of N channels of V. FUSED: they are all of V,
    and the delta rule's gated norm follows; else o is written, or SSD's gated y, in float32.

    CONV: (kind, W, D, RING, head size, has bias) of a convolution with SiLU. STREAMS: for q, k and
    v, (first covered channel or -1 where it is not convolved, first z column).
    """
    start_next(PDL)
    head = tl.program_id(0)
    seq = tl.program_id(1)
    start = tl.program_id(2) * (N * BLOCKS)
    i = tl.arange(0, KP)
    head_rate = tl.load(rate + head)
    head_bias = tl.load(dt_bias + head)
    # State and windows of earlier steps are on their way before the kernel before is done: until
    # this kernel, none of the step writes them.
    row = tl.load(offsets + seq)
    is_live = tl.load(offsets + seq + 1) > row
    position = tl.load(starts + seq)
    slot = tl.load(slots + seq).to(tl.int64)
    # The row is live, so its ring row is in its own slot.
    ring_row = tl.load(ring_rows + row, mask=is_live, other=0)
    key = (head // GROUP) * K + i
    is_key = is_live & (i < K)
    known_q = recall(
        key, is_key, static, ring, ring_stride, ring_row, position, 0, CONV, STREAMS
    )  # fmt: skip
    known_k = recall(
        key, is_key, static, ring, ring_stride, ring_row, position, 1, CONV, STREAMS
    )  # fmt: skip
    base = state + (slot * HEADS + head) * (K * V)
    befores = ()
    knowns = ()
    for block in tl.static_range(BLOCKS):
        j = start + block * N + tl.arange(0, N)
        inside = (i < K)[:, None] & (j < V)[None, :] & is_live & (position > 0)
        place = base + i[:, None] * V + j[None, :]
        befores = befores + (tl.load(place, mask=inside, other=0.0),)
        known = recall(
            head * V + j, is_live & (j < V), static, ring, ring_stride, ring_row, position, 2, CONV,
            STREAMS,
        )  # fmt: skip
        knowns = knowns + (known,)
    wait_previous(PDL)
    if is_live:
        line = x + row.to(tl.int64) * x_stride
        code = z + row.to(tl.int64) * z_stride
        q, raw_q = stream(
            line + Q_AT, key, i < K, known_q, code, bias, 0, SILU_Q, CONV, STREAMS
        )  # fmt: skip
        k, raw_k = stream(
            line + K_AT, key, i < K, known_k, code, bias, 1, SILU_K, CONV, STREAMS
        )  # fmt: skip
        soft = softplus(tl.load(a + row * a_stride + head).to(tl.float32) + head_bias)
        decay = tl.exp(head_rate * soft)
        values = ()
        raws = ()
        gates = ()
        for block in tl.static_range(BLOCKS):
            j = start + block * N + tl.arange(0, N)
            v, raw_v = stream(
                line + V_AT, head * V + j, j < V, knowns[block], code, bias, 2, SILU_V, CONV,
                STREAMS,
            )  # fmt: skip
            values = values + (v,)
            raws = raws + (raw_v,)
            there = gate + row.to(tl.int64) * gate_stride + head * V + j
            if FUSED or not DELTA:
                gates = gates + (silu(tl.load(there, mask=j < V, other=0.0).to(tl.float32)),)
        if DELTA:
            q *= tl.rsqrt(tl.sum(q * q, axis=0) + 1e-6) * SCALE
            k *= tl.rsqrt(tl.sum(k * k, axis=0) + 1e-6)
            beta = tl.sigmoid(tl.load(b + row * b_stride + head).to(tl.float32))
        else:
            head_skip = tl.load(skip + head)
        # Value heads that share a key head all convolve it; one of them keeps the input.
        is_keeper = (i < K) & (head % GROUP == 0) & (start == 0)
        keep(raw_q, key, is_keeper, ring, ring_stride, ring_row, 0, STREAMS)
        keep(raw_k, key, is_keeper, ring, ring_stride, ring_row, 1, STREAMS)
        squares = 0.0
        results = ()
        for block in tl.static_range(BLOCKS):
            j = start + block * N + tl.arange(0, N)
            inside = (i < K)[:, None] & (j < V)[None, :]
            place = base + i[:, None] * V + j[None, :]
            after = befores[block] * decay
            if DELTA:
                u = beta * (values[block] - tl.sum(after * k[:, None], axis=0))
            else:
                u = values[block] * soft
            after += k[:, None] * u[None, :]
            tl.store(place, after, mask=inside)
            keep(raws[block], head * V + j, j < V, ring, ring_stride, ring_row, 2, STREAMS)
            o = tl.sum(after * q[:, None], axis=0)
            if FUSED:
                squares += tl.sum(tl.where(j < V, o * o, 0.0), axis=0)
            if not DELTA:
                o = (o + head_skip * values[block]) * gates[block]
            results = results + (o,)
        if FUSED:
            inverse = tl.rsqrt(squares / V + EPS)
        for block in tl.static_range(BLOCKS):
            j = start + block * N + tl.arange(0, N)
            y = results[block]
            if FUSED:
                weight = tl.load(norm + j, mask=j < V, other=0.0).to(tl.float32)
                y = y * inverse * weight * gates[block]
            target = out + (row.to(tl.int64) * HEADS + head) * V + j
            tl.store(target, y.to(out.dtype.element_ty), mask=j < V)
