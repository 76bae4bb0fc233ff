"""A state that holds the whole past and cannot go back, through the engine: whatever is shared,
forked, preempted, aborted or launched ahead, each request gets what a loop over it alone gives."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from convserve.cache import CacheSizes, LayerSpec, RecurrentSpec, StateSpec, manager
from convserve.engine.core import EngineCore
from convserve.engine.messages import GenerateRequest, SamplingParams
from convserve.engine.models import ForwardBatch
from convserve.engine.resolve import Limits
from convserve.kernels import Ops
from hypothesis import given, settings
from hypothesis import strategies as st

VOCAB, MODULUS = 61, 2**31 - 1


def after(state: int, token: int) -> int:
    """The state after one more token."""
    return (state * 7919 + token + 1) % MODULUS


def continuation(prompt: list[int], count: int) -> list[int]:
    state, tokens = 0, list[int]()
    for token in prompt:
        state = after(state, token)
    for _ in range(count):
        tokens.append(state % VOCAB)
        state = after(state, tokens[-1])
    return tokens


class Accumulator:
    """A model whose next token is its recurrent state, which is a hash of every token so far."""

    ops = Ops()
    state_spec = StateSpec((LayerSpec(recurrent=RecurrentSpec(1, 1, 1)),), torch.float64, None)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        flat, state = batch.flat, batch.state[0].recurrent
        assert flat.spans is not None
        assert state is not None
        logits = torch.zeros(len(batch.token_ids), VOCAB)
        row = 0
        for (start, rows), slot in zip(flat.spans, flat.slots.tolist(), strict=True):
            value = int(state[slot]) if start else 0
            for _ in range(rows):
                value = after(value, int(batch.token_ids[row]))
                logits[row, value % VOCAB] = 1
                row += 1
            state[slot] = value
        return logits[batch.logit_rows]


@pytest.fixture(autouse=True, scope="module")
def snapshots_at_every_page() -> object:
    stride, manager.RECURRENT_STRIDE = manager.RECURRENT_STRIDE, 1
    yield
    manager.RECURRENT_STRIDE = stride


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[bool, int, list[int], int, int]]:
    """(aborted, step, prompt, max_tokens, n) of each arrival; prompts often begin alike."""
    prompts = st.lists(st.sampled_from([0, 0, 0, 0, 1]), min_size=1, max_size=30)
    return [
        (
            draw(st.sampled_from([False, False, False, True])),
            draw(st.integers(0, 30)),
            draw(prompts),
            draw(st.integers(1, 12)),
            draw(st.sampled_from([1, 1, 2, 3])),
        )
        for _ in range(draw(st.integers(1, 8)))
    ]


@given(
    arrivals=traffic(),
    num_pages=st.integers(11, 40),
    num_slots=st.integers(1, 6),
    budget=st.integers(1, 40),
    num_tails=st.sampled_from([0, 1, 3, 50]),
    overlap=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_mixed_traffic_equals_a_loop_over_each_alone(
    arrivals: list[tuple[bool, int, list[int], int, int]],
    num_pages: int,
    num_slots: int,
    budget: int,
    num_tails: int,
    overlap: bool,
) -> None:
    sizes = CacheSizes(num_pages, 4, num_slots, 1, num_tails)
    core = EngineCore(
        Accumulator(),
        Limits(sizes, 44, budget, 0),
        (),
        torch.device("cpu"),
        overlap=overlap,
        poison=True,
    )
    tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
    step = 0
    while core.has_work or step <= 34:
        for i, (aborted, at, prompt, count, n) in enumerate(arrivals):
            if at == step:
                params = SamplingParams(temperature=0, max_tokens=count, n=n)
                core.add(GenerateRequest(request_id=str(i), prompt=tuple(prompt), params=params))
            if aborted and at + 3 == step:
                core.abort(str(i))
        for event in core.step():
            assert event.error is None
            tokens[int(event.request_id), event.index] += event.token_ids
        core.check_integrity()
        step += 1
        assert step < 5000, "the engine never came to an end"
    for i, (aborted, _, prompt, count, n) in enumerate(arrivals):
        expected = continuation(prompt, count)
        for index in range(n):
            got = tokens[i, index]
            assert got == (expected[: len(got)] if aborted else expected)
    stats = core.stats()
    assert stats.pages_used == stats.slots_used == stats.replayed_tokens == 0


def test_a_conversation_resumes_from_the_state_it_ended_with() -> None:
    """The second turn recomputes no more than a page, whether or not steps run ahead."""
    for overlap in (True, False):
        sizes = CacheSizes(40, 4, 2, 1, 20)
        core = EngineCore(
            Accumulator(), Limits(sizes, 100, 64, 0), (), torch.device("cpu"), overlap=overlap
        )
        turn = [3] * 21
        params = SamplingParams(temperature=0, max_tokens=20)
        for expected_hits in (0, 40):
            before = core.stats().prefix_hits
            core.add(GenerateRequest(request_id="r", prompt=tuple(turn), params=params))
            while core.has_work:
                core.step()
            assert core.stats().prefix_hits - before == expected_hits
            turn = [*turn, *continuation(turn, 20), 5, 6]
