"""Whatever shares the batch, whatever is preempted, aborted, forked or cut: each request gets the
tokens that a loop over it alone would give, and everything it held comes back."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import pytest
import torch
from convserve.engine.drawing import uniform
from convserve.engine.messages import SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_model import VOCAB, MockModel, continuation, mock_core, next_token, request

if TYPE_CHECKING:
    from convserve.engine.core import EngineCore
    from convserve.engine.messages import TokenEvent

Output = dict[tuple[str, int], list[int]]


def drain(core: EngineCore, limit: int = 5000) -> tuple[Output, dict[tuple[str, int], TokenEvent]]:
    """Steps until nothing is left: tokens and last event of every choice."""
    tokens: Output = defaultdict(list)
    last: dict[tuple[str, int], TokenEvent] = {}
    for _ in range(limit):
        if not core.has_work:
            break
        for event in core.step():
            key = (event.request_id, event.index)
            assert key not in last or last[key].finish_reason is None, "events after the end"
            tokens[key] += event.token_ids
            last[key] = event
        core.check_integrity()
    assert not core.has_work, "the engine never came to an end"
    return tokens, last


def assert_empty(core: EngineCore) -> None:
    core.check_integrity()
    stats = core.stats()
    assert stats.running == stats.waiting == stats.pages_used == stats.slots_used == 0


# Often alike, so that prefixes are shared, diverge and are resumed.
prompts = st.one_of(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    st.lists(st.sampled_from([0, 0, 0, 0, 1]), min_size=1, max_size=30),
)


@st.composite
def traffic(draw: st.DrawFn) -> list[tuple[str, int, list[int], int, int, int]]:
    """(kind, step, prompt, max_tokens, n, priority) of each arrival, by step."""
    count = draw(st.integers(1, 8))
    return [
        (
            draw(st.sampled_from(["run", "run", "run", "abort"])),
            draw(st.integers(0, 30)),
            draw(prompts),
            draw(st.integers(1, 12)),
            draw(st.sampled_from([1, 1, 2, 3])),
            draw(st.sampled_from([0, 0, 1, -1])),
        )
        for _ in range(count)
    ]


@given(
    arrivals=traffic(),
    num_pages=st.integers(11, 40),
    num_slots=st.integers(1, 6),
    budget=st.integers(1, 40),
    num_tails=st.sampled_from([0, 1, 3, 50]),
    overlap=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_mixed_traffic_equals_a_loop_over_each_alone(
    arrivals: list[tuple[str, int, list[int], int, int, int]],
    num_pages: int,
    num_slots: int,
    budget: int,
    num_tails: int,
    overlap: bool,
) -> None:
    """Arrivals at any time, chunks of any size, pools down to one sequence, forks and aborts."""
    core = mock_core(
        num_pages=num_pages,
        num_slots=num_slots,
        max_batch_tokens=budget,
        max_model_len=44,
        num_tails=num_tails,
        overlap=overlap,
    )
    tokens: Output = defaultdict(list)
    ended: set[tuple[str, int]] = set()
    step = 0
    while core.has_work or step <= 60:
        for i, (kind, at, prompt, max_tokens, n, priority) in enumerate(arrivals):
            if at == step:
                core.add(request(str(i), prompt, max_tokens, n=n, priority=priority))
            if kind == "abort" and at + 3 == step:
                core.abort(str(i))
        for event in core.step():
            tokens[event.request_id, event.index] += event.token_ids
            if event.finish_reason is not None:
                assert event.finish_reason == "length"
                ended.add((event.request_id, event.index))
        core.check_integrity()
        step += 1
        assert step < 5000, "the engine never came to an end"
    for i, (kind, _, prompt, max_tokens, n, _) in enumerate(arrivals):
        for index in range(n):
            expected = continuation(prompt, max_tokens)
            got = tokens[str(i), index]
            if kind == "run" or (str(i), index) in ended:
                assert got == expected
            else:
                assert got == expected[: len(got)]
    assert_empty(core)


def test_many_requests_through_a_pool_that_holds_one() -> None:
    core = mock_core(num_pages=4, page_size=4, num_slots=8, max_model_len=16)
    for i in range(10):
        core.add(request(str(i), [i, i + 1, i + 2], 12))
    tokens, _ = drain(core)
    for i in range(10):
        assert tokens[str(i), 0] == continuation([i, i + 1, i + 2], 12)
    assert core.stats().preemptions > 0
    assert_empty(core)


def test_preemption_takes_the_last_in_rank() -> None:
    core = mock_core(num_pages=8, page_size=2, num_slots=4, max_model_len=16)
    core.add(request("late but urgent", [1, 2], 12, priority=-1))
    core.add(request("first", [3, 4], 12))
    core.add(request("second", [5, 6], 12))
    finished: list[str] = []
    while core.has_work:
        finished += [e.request_id for e in core.step() if e.finish_reason]
    assert core.stats().preemptions > 0
    assert finished == ["late but urgent", "first", "second"]


def test_a_long_prompt_does_not_stall_a_stream() -> None:
    """While a prompt of 40 chunks is computed, a running stream gets a token every step."""
    core = mock_core(num_pages=64, max_batch_tokens=2)
    core.add(request("stream", [1], 30))
    core.step()
    core.add(request("long", list(range(40)), 1))
    for _ in range(20):
        assert [e.request_id for e in core.step()] == ["stream"]


def test_choices_share_the_prompts_pages() -> None:
    core = mock_core(num_pages=64, page_size=4, num_slots=4)
    core.add(request("r", range(20), 6, n=3))
    peak = 0
    while core.has_work:
        core.step()
        peak = max(peak, core.stats().pages_used)
    # 5 pages of prompt, of which 4 are shared, and at most 2 more for each choice's last tokens.
    assert peak <= 4 + 3 * 3
    assert core.stats().prompt_tokens == 20
    assert_empty(core)


def test_a_choice_that_ends_with_its_first_token_leaves_the_prompt_to_the_others() -> None:
    core = mock_core()
    core.add(request("r", range(9), 1, n=3))
    tokens, last = drain(core)
    assert [tokens["r", i] for i in range(3)] == [[next_token(range(9))]] * 3
    assert all(last["r", i].finish_reason == "length" for i in range(3))
    assert_empty(core)


def test_aborting_the_first_choice_keeps_the_others() -> None:
    core = mock_core(max_batch_tokens=4)
    core.add(request("r", range(9), 5, n=3))
    core.step()
    core.abort("r", 0)
    tokens, _ = drain(core)
    assert tokens["r", 0] == []
    assert tokens["r", 1] == tokens["r", 2] == continuation(range(9), 5)
    assert_empty(core)


def test_an_abort_frees_everything_before_the_next_step() -> None:
    core = mock_core()
    core.add(request("r", range(9), 50, n=2))
    core.step()
    core.step()
    core.abort("r")
    assert_empty(core)
    core.abort("r")
    core.abort("never seen")


@pytest.mark.parametrize("position", [0, 3])
def test_stop_tokens_and_eos(position: int) -> None:
    prompt = [5, 6, 7]
    stop = continuation(prompt, 10)[position]
    for eos, params, token in (
        ((), {"stop_token_ids": (stop,)}, stop),
        ((stop,), {}, None),
    ):
        core = mock_core(eos=eos)
        core.add(request("r", prompt, 10, **params))
        tokens, last = drain(core)
        assert tokens["r", 0] == continuation(prompt, 10, [stop])
        assert last["r", 0].finish_reason == "stop"
        assert last["r", 0].stop_token == token


def test_ignore_eos_and_min_tokens() -> None:
    prompt = [5, 6, 7]
    greedy = continuation(prompt, 8)
    core = mock_core(eos=(greedy[0],))
    core.add(request("ignores", prompt, 8, ignore_eos=True))
    core.add(request("waits", prompt, 8, min_tokens=3))
    tokens, last = drain(core)
    assert tokens["ignores", 0] == greedy
    assert last["ignores", 0].finish_reason == "length"
    assert len(tokens["waits", 0]) >= 3
    assert greedy[0] not in tokens["waits", 0][:3]


def test_the_context_ends_a_sequence() -> None:
    core = mock_core(max_model_len=12)
    core.add(request("r", range(9), 50))
    core.add(request("open", range(9), max_tokens=None))  # pyright: ignore[reportArgumentType]
    tokens, last = drain(core)
    assert len(tokens["r", 0]) == len(tokens["open", 0]) == 3
    assert last["r", 0].finish_reason == "length"


def test_broken_logits_end_their_request_alone() -> None:
    model = MockModel()
    model.broken_after = 12
    core = mock_core(model)
    core.add(request("long", range(9), 20))
    core.add(request("short", [1, 2], 5))
    tokens, last = drain(core)
    assert last["long", 0].finish_reason == "error"
    assert "not finite" in (last["long", 0].error or "")
    assert core.stats().corrupted_requests == 1
    assert tokens["short", 0] == continuation([1, 2], 5)
    assert_empty(core)


@pytest.mark.parametrize("budget", [1, 3, 64])
def test_prompt_logprobs_cover_every_prompt_token_once(budget: int) -> None:
    core = mock_core(max_batch_tokens=budget, num_pages=8, max_model_len=32)
    prompt = list(range(20))
    core.add(request("scored", prompt, 3, prompt_logprobs=2))
    core.add(request("other", [4, 4], 20))  # so that one is preempted
    first: TokenEvent | None = None
    while core.has_work:
        for event in core.step():
            if event.request_id == "scored" and first is None:
                first = event
    assert first is not None
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == len(prompt)
    assert first.prompt_logprobs[0] is None
    for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
        assert entry is not None
        assert entry.token_id == prompt[position]
        best = next_token(prompt[:position])
        assert entry.top[0][0] == best
        assert (entry.rank == 1) == (best == prompt[position])


def test_seeded_draws_do_not_depend_on_the_batch() -> None:
    params = {"temperature": 1.5, "seed": 7, "n": 2, "top_p": 0.9}
    alone = mock_core()
    alone.add(request("r", [1, 2, 3], 10, **params))
    expected, _ = drain(alone)
    assert expected["r", 0] != expected["r", 1]
    crowded = mock_core(num_pages=16, max_batch_tokens=3, max_model_len=40)
    for i in range(4):
        crowded.add(request(str(i), [i, 9], 15))
    crowded.add(request("r", [1, 2, 3], 10, **params))
    got, _ = drain(crowded)
    assert [got["r", i] for i in (0, 1)] == [expected["r", i] for i in (0, 1)]


def test_uniform_numbers_are_uniform_and_distinct() -> None:
    draws = torch.tensor([uniform(3, i % 2, i // 2) for i in range(4000)])
    assert len(draws.unique()) == len(draws)
    assert 0 <= float(draws.min()) < float(draws.max()) < 1
    histogram = torch.histc(draws, 10, 0, 1)
    assert float((histogram - 400).abs().max()) < 100


def test_params_have_a_stable_default() -> None:
    assert SamplingParams() == SamplingParams(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0)


def hits(core: EngineCore, prompt: list[int], **params: object) -> int:
    """Runs a prompt to its end; the tokens it was spared."""
    before = core.stats().prefix_hits
    core.add(request("hit", prompt, 3, **params))
    tokens, _ = drain(core)
    assert tokens["hit", 0] == continuation(prompt, 3)
    return core.stats().prefix_hits - before


@pytest.mark.parametrize("num_tails", [0, 8])
def test_a_conversation_hits_its_own_past(num_tails: int) -> None:
    core = mock_core(num_tails=num_tails)
    turn = [*range(50, 71)]
    assert hits(core, turn) == 0
    turn = [*turn, *continuation(turn, 3), 7, 8, 9]
    # 21 + 3 tokens, of which the last was never computed: 23, so 5 full pages of 4.
    assert hits(core, turn) == 20
    replayed = core.stats().replayed_tokens
    assert replayed == (4 if num_tails else 6)
    assert hits(core, turn) == 24
    # A tail was stored where the second branched off, at 20, and now at 24.
    assert core.stats().replayed_tokens - replayed == (4 if num_tails else 6)
    assert hits(core, turn) == 24
    assert core.stats().replayed_tokens - replayed == (4 if num_tails else 12)
    assert core.stats().prefix_queries == 21 + 27 + 27 + 27


@pytest.mark.parametrize("overlap", [True, False])
def test_pages_that_an_answer_filled_are_hit_too(overlap: bool) -> None:
    """Else every turn of a conversation computes the answer before it again."""
    core = mock_core(overlap=overlap)
    core.add(request("first", [1, 2, 3, 4, 5], 20))
    drain(core)
    turn = [1, 2, 3, 4, 5, *continuation([1, 2, 3, 4, 5], 20), 7]
    assert hits(core, turn) == 24  # all but the last token of the answer: 6 pages of 4


def test_cached_tokens_are_reported_once_and_resets_forget_them() -> None:
    core = mock_core()
    hits(core, list(range(20)))
    core.add(request("r", list(range(20)), 2))
    events = [event for _ in range(2) for event in core.step()]
    assert [e.num_cached_tokens for e in events] == [16, 0]
    core.reset_prefixes()
    assert core.stats().pages_kept == 0
    assert hits(core, list(range(20))) == 0


def test_salts_and_switches_keep_prefixes_apart() -> None:
    core = mock_core()
    hits(core, list(range(20)), cache_salt="a")
    assert hits(core, list(range(20)), cache_salt="b") == 0
    assert hits(core, list(range(20)), cache_salt="a") == 16
    off = mock_core(prefix_caching=False)
    hits(off, list(range(20)))
    assert hits(off, list(range(20))) == 0
    assert off.stats().pages_kept == 0


def test_scored_prompts_are_computed_whole() -> None:
    """Rows that the cache spares have no logits to score with."""
    core = mock_core()
    hits(core, list(range(20)))
    core.add(request("r", list(range(20)), 1, prompt_logprobs=0))
    (event,) = [e for _ in range(3) for e in core.step()]
    assert event.num_cached_tokens == 0
    assert event.prompt_logprobs is not None
    assert len(event.prompt_logprobs) == 20


def test_a_preempted_sequence_resumes_from_its_own_pages() -> None:
    rows: dict[bool, int] = {}
    for caching in (True, False):
        core = mock_core(
            num_pages=12, page_size=2, max_model_len=24, max_batch_tokens=64, prefix_caching=caching
        )
        core.add(request("first", [1, 2, 3], 12))
        core.add(request("second", [4, 5, 6], 18))
        rows[caching] = 0
        while core.has_work:
            core.step()
            rows[caching] += core.stats().step_tokens
        assert core.stats().preemptions == 1
    assert core.stats().prefix_queries == 6  # what a preemption takes is no query
    # All but the page that the first took from it, and a replay.
    assert rows[True] == rows[False] - 10 + 6


def test_a_tail_saved_by_an_aborted_request_survives_an_idle_step() -> None:
    core = mock_core(num_tails=4, max_batch_tokens=8, num_slots=1)
    prompt = list(range(10))  # so near to its end that nothing is forgotten
    core.add(request("gone", prompt, 5))
    core.step()
    core.abort("gone")
    assert core.step() == []
    assert hits(core, prompt) == 8
    assert core.stats().replayed_tokens == 0
