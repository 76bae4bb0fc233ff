"""Figures against a server whose delays are known: who reads a report may believe it.

Truth is the server's own log of when it wrote each chunk (same clock), so a busy machine delays
both sides alike. Medians are compared tightly; tails only where the programmed effect is large.
"""

from __future__ import annotations

import asyncio
import heapq
import time

import numpy as np
import pytest
from convserve.loadtest.audit import audit
from convserve.loadtest.figures import e2e, figures, itl_samples, tpot, ttft, ttft_service


def measured(load):
    return figures(load.records, 0.0, max(r.end for r in load.records) + 1e-6)


async def test_token_stamps_agree_with_the_servers_own_log(mock, load):
    """A client that stamps late (after parsing, after other streams) reports too much latency."""
    mock.program(ttft=[0.03, 0.08], itl=[0.01, 0.03])
    done = await load(
        {
            "load": {"concurrency": 3, "max_requests": 18},
            "traffic": [{"output_tokens": 9, "prompt_tokens": 20}],
        }
    )
    log = {tuple(entry["prompt"]): entry for entry in mock.log()}
    late, gap_error = [], []
    for record in done.records:
        prompt = done.plan.session(record.index).turns[0].prompt
        entry = log[tuple(prompt)]
        arrivals = done.origin + record.intended + np.array(record.chunk_offsets()) / 1e6
        late.append(arrivals - entry["chunks"])
        gap_error.append(np.diff(arrivals) - np.diff(entry["chunks"]))
        assert record.output_tokens == 9
        assert record.basis == "ids"
    assert np.median(np.concatenate(late)) < 0.0006
    assert np.min(np.concatenate(late)) > -0.0001
    assert abs(np.median(np.concatenate(gap_error))) < 0.0002
    found = measured(done)
    truth = np.concatenate([np.diff(entry["chunks"]) for entry in log.values()])
    itl = found.latency["itl"]
    assert itl.count == truth.size
    assert itl.mean.value == pytest.approx(truth.mean(), rel=0.01, abs=2e-4)
    assert itl.percentiles["p50"].value == pytest.approx(np.median(truth), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("open_loop", [False, True])
async def test_all_time_of_a_request_is_the_servers_the_ways_or_the_gap(mock, load, open_loop):
    """What the client does between two requests may not pass for the server's time, nor any time
    get lost between the stamps: a figure is the server's own, plus the ways, plus `send_gap`."""
    mock.program(ttft=[0.02, 0.005, 0.005], itl=[0.005, 0.002])
    how = {"strategy": "constant", "rate": 40} if open_loop else {"concurrency": 3}
    done = await load(
        {
            "load": {**how, "max_requests": 24, "warmup": 3},
            "traffic": [{"output_tokens": 6, "prompt_tokens": 20}],
        }
    )
    log = {tuple(entry["prompt"]): entry for entry in mock.log()}
    ends = []
    for record in done.records:
        entry = log[tuple(done.plan.session(record.index).turns[0].prompt)]
        arrived, end = entry["arrived"] - done.origin, entry["end"] - done.origin
        written = np.array(entry["chunks"]) - done.origin
        order = [record.intended, record.dispatched, record.sent, arrived, written[0]]
        order += [record.first_token, record.last_token, record.end]
        assert order == sorted(order)
        assert record.first_byte <= record.first_token
        assert written[-1] <= end <= record.end
        assert record.reused or open_loop
        there, back = arrived - record.sent, record.first_token - written[0]
        gap = record.sent - record.intended
        assert ttft(record) == pytest.approx(gap + there + (written[0] - arrived) + back, abs=1e-9)
        assert e2e(record) == pytest.approx(gap + there + end - arrived + record.end - end)
        spent = tpot(record) * 5 - (written[-1] - written[0])
        assert spent == pytest.approx(record.last_token - written[-1] - back, abs=1e-9)
        assert record.end <= record.last_byte
        ends.append(record.last_byte)
    if not open_loop:
        # each user's next request is due when, and not before, an answer has come to its end
        starts = sorted(record.intended for record in done.records)[3:]
        assert starts == pytest.approx(sorted(ends)[: len(starts)], abs=1e-9)


def stalled_truth(intended, in_flight, stall):
    """Time to first token of each arrival at a server that takes 5 + 1 ms and stalls once."""
    free = [0.0] * in_flight
    waits = []
    for moment in intended:
        first = max(moment, heapq.heappop(free)) + 0.005
        first = stall[1] if stall[0] <= first < stall[1] else first
        heapq.heappush(free, first + 0.001)
        waits.append(first - moment)
    return np.array(waits)


@pytest.mark.parametrize("in_flight", [2, None])
async def test_a_stall_of_the_server_shows_in_full_in_an_open_loop(mock, load, in_flight):
    """Coordinated omission: a client that waits with sending hides the stall from its users."""
    mock.program(ttft=[0.005], itl=[0.001], stall=[0.5, 1.5])
    table = {
        "load": {"strategy": "constant", "rate": 40, "max_duration": 2.0},
        "traffic": [{"output_tokens": 2, "prompt_tokens": 4}],
    }
    if in_flight:
        table["load"]["max_in_flight"] = in_flight
    done = await load(table)
    intended = np.array([r.intended for r in done.records])
    assert intended == pytest.approx(np.arange(80) / 40)
    truth = stalled_truth(intended, in_flight or 80, (0.5, 1.5))
    response = np.array([ttft(r) for r in done.records])
    assert response.mean() == pytest.approx(truth.mean(), rel=0.15)
    for q in (0.75, 0.9, 1.0):
        assert np.quantile(response, q) == pytest.approx(np.quantile(truth, q), rel=0.15)
    found = measured(done).latency
    if in_flight:
        # what a tool that counts from the real send would have reported
        service = np.array([ttft_service(r) for r in done.records])
        assert np.count_nonzero(service > 0.5) <= in_flight + 1
        assert found["send_gap"].max > 0.8
    else:
        assert np.count_nonzero(response > 0.5) == pytest.approx(20, abs=3)
        assert found["send_gap"].percentiles["p50"].value < 0.02


async def test_an_open_loop_never_waits_for_answers(mock, load):
    """Arrivals follow the schedule although each answer takes longer than the gap."""
    mock.program(ttft=[0.3])
    done = await load(
        {
            "load": {"strategy": "poisson", "rate": 50, "max_requests": 30},
            "traffic": [{"output_tokens": 1, "prompt_tokens": 4}],
        }
    )
    expected = done.plan.offsets
    assert [r.intended for r in done.records] == pytest.approx(expected)
    sent = np.array([r.sent for r in done.records])
    assert np.median(sent - expected) < 0.005
    assert measured(done).latency["ttft"].percentiles["p50"].value == pytest.approx(0.3, rel=0.05)


async def test_a_closed_loop_keeps_its_concurrency_in_the_warm_up_too(mock, load):
    """A warm-up at another concurrency warms the wrong thing; one that overlaps is measured."""
    mock.program(ttft=[0.02])
    done = await load(
        {
            "load": {"concurrency": 3, "max_requests": 12, "warmup": 7},
            "traffic": [{"output_tokens": 1, "prompt_tokens": 4}],
        }
    )
    assert len(done.records) == 12
    assert min(r.index for r in done.records) == 0
    log = mock.log()
    assert len(log) == 19
    moments = np.array([entry["chunks"][0] for entry in log])
    levels = [sum(e["arrived"] <= m <= e["chunks"][0] for e in log) for m in moments]
    assert max(levels) == 3
    warm_end = sorted(entry["end"] for entry in log)[6]
    assert sorted(entry["arrived"] for entry in log)[7] > warm_end


async def test_users_follow_the_stages_of_a_closed_loop(mock, load):
    mock.program(ttft=[0.02])
    stages = [{"duration": 0.3, "level": 1}, {"duration": 0.3, "level": 4}]
    done = await load(
        {
            "load": {"stages": stages},
            "traffic": [{"output_tokens": 1, "prompt_tokens": 4}],
        }
    )
    first = [r for r in done.records if r.intended < 0.28]
    second = [r for r in done.records if r.intended > 0.32]
    assert len(second) > 2 * len(first)
    log = mock.log()
    at = {e["arrived"]: sum(o["arrived"] <= e["arrived"] <= o["end"] for o in log) for e in log}
    assert max(level for time, level in at.items() if time < done.origin + 0.28) == 1
    assert max(at.values()) == 4


async def test_chunks_of_several_tokens_are_not_passed_off_as_exact(mock, load):
    mock.program(per_chunk=[1, 4], itl=[0.02])
    done = await load(
        {
            "load": {"concurrency": 2, "max_requests": 8},
            "traffic": [{"output_tokens": 11, "prompt_tokens": 4}],
        }
    )
    gaps, exact = itl_samples(done.records[0])
    # chunks of 1, 4, 1, 4, 1: the first has no gap, the single ones are exact
    assert gaps.size == 10
    assert exact == 2
    found = measured(done)
    assert found.itl_exact_ratio == pytest.approx(0.2)
    assert found.latency["itl"].mean.value == pytest.approx(0.08 / 10, rel=0.1)


async def test_hidden_tokens_refuse_itl_but_keep_tpot(mock, load):
    """Without ids or running usage, gaps between chunks are not gaps between tokens."""
    mock.program(per_chunk=[3], itl=[0.03], ids=False, running_usage=False)
    table = {
        "load": {"concurrency": 2, "max_requests": 6},
        "traffic": [{"output_tokens": 9, "prompt_tokens": 4}],
    }
    found = measured(await load(table))
    assert "itl" not in found.latency
    assert "6 of 6" in found.refused["itl"]
    assert found.latency["tpot"].mean.value == pytest.approx(0.06 / 8, rel=0.1)
    assert found.rates["output_token_rate"].value > 0


@pytest.mark.parametrize(
    ("program", "basis"),
    [
        ({"ids": False}, "usage"),
        ({"ids": False, "running_usage": False}, "count"),
        ({"ids": False, "running_usage": False, "final_usage": False}, "unknown"),
    ],
)
async def test_tokens_are_counted_by_what_the_server_offers(mock, load, program, basis):
    mock.program(itl=[0.001], **program)
    done = await load(
        {
            "load": {"max_requests": 2},
            "request": {"endpoint": "chat"},
            "traffic": [{"output_tokens": 5, "prompt_tokens": 20}],
        }
    )
    assert {r.basis for r in done.records} == {basis}
    assert {r.output_tokens for r in done.records} == {None if basis == "unknown" else 5}


async def test_a_client_that_cannot_keep_up_is_flagged(mock, load):
    """Blocking the client's event loop makes every server look slow: the run must say so."""

    async def block() -> None:
        while True:
            time.sleep(0.05)
            await asyncio.sleep(0.02)

    mock.program(ttft=[0.05])
    table = {
        "load": {"strategy": "constant", "rate": 40, "max_duration": 1.0},
        "traffic": [{"output_tokens": 3, "prompt_tokens": 4}],
    }
    done = await load(table, beside=block)
    judged = audit(done.records, [done.audit])
    assert not judged.valid
    assert any("event loop was late" in reason for reason in judged.reasons)
    assert any("sends were late" in reason for reason in judged.reasons)
