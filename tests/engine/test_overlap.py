"""A step launched before the last one's tokens are known changes nothing that a request gets."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_model import VOCAB, MockModel, continuation, mock_core, request

if TYPE_CHECKING:
    from convserve.engine.core import EngineCore
    from convserve.engine.messages import TokenEvent

Arrival = tuple[int, list[int], dict[str, object]]


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    """(step, prompt, parameters), every parameter whose effect depends on tokens among them."""
    return [
        (
            draw(st.integers(0, 12)),
            draw(st.lists(st.integers(0, 3), min_size=1, max_size=20)),
            {
                "max_tokens": draw(st.integers(1, 12)),
                "temperature": draw(st.sampled_from([0.0, 0.0, 1.5])),
                "seed": draw(st.integers(0, 3)),
                "n": draw(st.sampled_from([1, 1, 2])),
                "repetition_penalty": draw(st.sampled_from([1.0, 1.0, 1.5])),
                "frequency_penalty": draw(st.sampled_from([0.0, 0.0, 0.7])),
                "min_tokens": draw(st.sampled_from([0, 0, 4])),
                "logprobs": draw(st.sampled_from([None, None, 2])),
                "prompt_logprobs": draw(st.sampled_from([None, None, 1])),
                "stop_token_ids": tuple(range(draw(st.sampled_from([0, 0, VOCAB // 3])))),
            },
        )
        for _ in range(draw(st.integers(1, 6)))
    ]


def outcome(core: EngineCore, requests: list[Arrival]) -> dict[tuple[str, int], list[object]]:
    """Everything that each choice was told, whatever the step."""
    told: dict[tuple[str, int], list[object]] = defaultdict(list)
    step = 0
    while core.has_work or step <= 12:
        for i, (at, prompt, params) in enumerate(requests):
            if at == step:
                fields = dict(params)
                max_tokens = fields.pop("max_tokens")
                assert isinstance(max_tokens, int)
                core.add(request(str(i), prompt, max_tokens, **fields))
        for e in core.step():
            told[e.request_id, e.index].append(
                (e.token_ids, e.logprobs, e.finish_reason, e.stop_token, e.prompt_logprobs)
            )
        core.check_integrity()
        step += 1
        assert step < 3000, "the engine never came to an end"
    stats = core.stats()
    assert stats.running == stats.waiting == stats.pages_used == stats.slots_used == 0
    return told


@given(
    requests=arrivals(),
    num_pages=st.integers(9, 40),
    num_slots=st.integers(1, 6),
    budget=st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_overlap_changes_nothing(
    requests: list[Arrival], num_pages: int, num_slots: int, budget: int
) -> None:
    outcomes = [
        outcome(
            mock_core(
                num_pages=num_pages,
                num_slots=num_slots,
                max_batch_tokens=budget,
                max_model_len=34,
                eos=(7,),
                overlap=overlap,
            ),
            requests,
        )
        for overlap in (False, True)
    ]
    assert outcomes[0] == outcomes[1]


def test_a_step_is_launched_before_the_last_ones_tokens_are_read() -> None:
    core = mock_core(overlap=True)
    core.add(request("r", [1, 2], 3))
    events: list[TokenEvent] = core.step()
    assert events == []
    assert core.stats().steps == 1
    told = [[t for e in core.step() for t in e.token_ids] for _ in range(3)]
    assert told == [[t] for t in continuation([1, 2], 3)]
    assert core.stats().steps == 3, "no step for the token after the last"
    assert not core.has_work


@pytest.mark.parametrize("end", ["abort", "stop", "broken"])
def test_a_sequence_that_ends_while_its_next_step_runs_leaves_nothing_behind(end: str) -> None:
    model = MockModel()
    tokens = continuation([1, 2], 8)
    if end == "broken":
        model.broken_after = 5
    core = mock_core(model, overlap=True)
    stops = (tokens[2],) if end == "stop" else ()
    core.add(request("r", [1, 2], 8, stop_token_ids=stops))
    core.add(request("other", [5], 4))
    got: dict[str, list[int]] = defaultdict(list)
    for step in range(40):
        if step == 4 and end == "abort":
            core.abort("r")
        for e in core.step():
            got[e.request_id] += e.token_ids
        core.check_integrity()
    assert got["r"] == tokens[: len(got["r"])]
    assert len(got["r"]) == 3
    assert got["other"] == continuation([5], 4)
    assert core.stats().pages_used == core.stats().slots_used == 0
    assert not core.has_work
