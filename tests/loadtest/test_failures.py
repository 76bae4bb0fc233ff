"""Every way a request can go wrong has a name and is counted; none passes for a success."""

from __future__ import annotations

import socket

import pytest
from convserve.loadtest.figures import figures


def table(count=6, tokens=6, **load):
    return {
        "load": {"concurrency": 2, "max_requests": count, **load},
        "traffic": [{"output_tokens": tokens, "prompt_tokens": 4}],
    }


@pytest.mark.parametrize(
    ("fail", "outcome", "message"),
    [
        ("status:500", "http_error", "HTTP 500: programmed"),
        ("status:429", "http_error", "HTTP 429: programmed"),
        ("reset", "reset", None),
        ("drop:3", "truncated", None),
        ("error:2", "error_event", "programmed"),
        ("no_done", "truncated", "without [DONE]"),
        ("no_finish", "truncated", "without a finish_reason"),
        ("malformed", "malformed", None),
        ("short", "short_output", "3 of 6 tokens"),
        ("empty", "empty_output", "no token"),
    ],
)
async def test_failure_is_named(mock, load, fail, outcome, message):
    mock.program(itl=[0.002], ttft=[0.005], fail=fail, fail_every=3)
    records = (await load(table())).records
    outcomes = [r.outcome for r in records]
    assert outcomes.count("ok") == 4
    assert outcomes.count(outcome) == 2
    failed = next(r for r in records if r.failed)
    if message:
        assert message in failed.message
    found = figures(records, 0.0, 10.0)
    assert found.failed == 2
    assert found.error_ratio == pytest.approx(1 / 3)
    assert found.latency["e2e"].count == 4


async def test_nobody_listening_is_refused(load):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        records = (await load(table(2), url=url)).records
    assert [r.outcome for r in records] == ["refused", "refused"]


async def test_a_request_that_takes_too_long_times_out(mock, load):
    mock.program(ttft=[0.005, 5.0], itl=[0.002])
    records = (await load(table(2), timeout=0.3)).records
    assert sorted(r.outcome for r in records) == ["ok", "timeout"]
    late = next(r for r in records if r.outcome == "timeout")
    assert late.end - late.intended == pytest.approx(0.3, abs=0.2)


async def test_retries_count_their_time(mock, load):
    """Response time runs from the intended send through refusals; service time does not."""
    mock.program(ttft=[0.005], itl=[0.002], fail="status:503", fail_every=2, retry_after="0.2")
    records = (await load(table(3, concurrency=1), retries=2)).records
    assert {r.outcome for r in records} == {"ok"}
    retried = [r for r in records if r.attempts == 2]
    assert retried
    assert all(r.sent - r.intended > 0.19 for r in retried)


async def test_connections_are_kept_and_replaced(mock, load):
    """A new connection for each request would add its cost to every TTFT."""
    mock.program(ttft=[0.001], itl=[0.001], fail="drop:0", fail_every=4)
    records = (await load(table(8, concurrency=1))).records
    assert [r.reused for r in records] == [False, True, True, True, False, True, True, True]
    records = (await load(table(3, concurrency=1), keep_alive=False)).records
    assert not any(r.reused for r in records)


async def test_failed_sessions_say_how_many_turns_were_not_sent(mock, load):
    mock.program(ttft=[0.002], itl=[0.001], fail="status:500", fail_every=2)
    shape = table(1)
    shape["traffic"][0]["turns"] = 5
    done = await load(shape)
    assert len(done.records) == 2
    assert done.abandoned_turns == 3
