"""Workloads as the server sees them: sessions, cancellations, slow readers, canaries, prefixes."""

from __future__ import annotations

import pytest
from convserve.loadtest.figures import figures


async def test_a_cancelled_request_disconnects_and_is_no_failure(mock, load):
    mock.program(ttft=[0.005], itl=[0.02])
    done = await load(
        {
            "load": {"concurrency": 2, "max_requests": 6},
            "traffic": [
                {"output_tokens": 40, "prompt_tokens": 4, "cancel_share": 1, "cancel_after": 3}
            ],
        }
    )
    assert {r.outcome for r in done.records} == {"cancelled"}
    assert all(len(r.chunk_offsets()) == 3 for r in done.records)
    assert all(entry["cancelled"] for entry in mock.log())
    found = figures(done.records, 0.0, 10.0)
    assert (found.failed, found.cancelled) == (0, 6)
    assert "ttft" in found.latency
    assert "e2e" not in found.latency


async def test_turns_carry_the_history_and_wait_for_the_user(mock, load):
    mock.program(ttft=[0.005], itl=[0.001])
    done = await load(
        {
            "load": {"max_requests": 1},
            "request": {"endpoint": "chat"},
            "traffic": [
                {
                    "output_tokens": 3,
                    "prompt_tokens": 20,
                    "turns": 3,
                    "think_time": 0.1,
                    "prefix_tree": [{"fanout": 1, "tokens": 10}],
                }
            ],
        }
    )
    prompts = [entry["prompt"] for entry in mock.log()]
    assert [len(p) for p in prompts] == [2, 4, 6]
    assert prompts[2][:4] == prompts[1]
    assert prompts[1][2] == {"role": "assistant", "content": "t0 t1 t2 "}
    assert prompts[0][0]["role"] == "system"
    first, second, third = done.records
    for before, after in ((first, second), (second, third)):
        assert before.last_byte >= before.end
        assert after.intended == pytest.approx(before.last_byte + 0.1)


async def test_token_prompts_carry_the_answers_ids(mock, load):
    mock.program(ttft=[0.002], itl=[0.001])
    await load(
        {
            "load": {"max_requests": 1},
            "traffic": [{"output_tokens": 2, "prompt_tokens": 5, "turns": 2}],
        }
    )
    first, second = (entry["prompt"] for entry in mock.log())
    assert len(first) == 5
    assert second[:7] == [*first, 2000, 2001]
    assert len(second) == 12


async def test_a_slow_reader_does_not_count_as_a_slow_server(mock, load):
    mock.program(ttft=[0.002], itl=[0.001])
    done = await load(
        {
            "load": {"concurrency": 4, "max_requests": 8},
            "traffic": [
                {"name": "fast", "output_tokens": 20, "prompt_tokens": 4},
                {
                    "name": "slow",
                    "output_tokens": 20,
                    "prompt_tokens": 4,
                    "slow_share": 1,
                    "slow_rate": 12000,
                },
            ],
        }
    )
    slow = [r for r in done.records if r.slow_reader]
    fast = [r for r in done.records if not r.slow_reader]
    assert slow
    assert fast
    assert min(r.end - r.intended for r in slow) > max(r.end - r.intended for r in fast)
    assert figures(done.records, 0.0, 10.0).latency["e2e"].count == len(fast)


async def test_the_canary_notices_one_wrong_byte(mock, load):
    """Corruption under load (state of one request leaking into another) shows nowhere else."""
    mock.program(ttft=[0.002], itl=[0.001], corrupt_from=8)
    right = "".join(f"t{k} " for k in range(32))
    done = await load(
        {
            "load": {"max_requests": 12},
            "traffic": [{"output_tokens": 2, "prompt_tokens": 4}],
            "canary": {"every": 3},
        },
        canary=right,
    )
    canaries = [r for r in done.records if r.kind == "canary"]
    assert len(canaries) == 4
    assert canaries[0].canary_match is True
    assert canaries[-1].canary_match is False
    assert len([r for r in done.records if r.kind == "load"]) == 12
    assert figures(done.records, 0.0, 10.0).requests == 12


async def test_bodies_ask_for_what_makes_itl_exact(mock, load):
    mock.program(ttft=[0.001], itl=[0.001])
    table = {
        "load": {"max_requests": 1},
        "traffic": [{"output_tokens": 2, "prompt_tokens": 4, "extra": {"priority": 3}}],
    }
    await load(table)
    (entry,) = mock.log()
    body = entry["body"]
    assert body["return_token_ids"] is True
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert (body["ignore_eos"], body["max_tokens"], body["priority"]) == (True, 2, 3)
    await load(table, vendor_fields=False)
    plain = mock.log()[-1]["body"]
    assert "return_token_ids" not in plain
    assert "ignore_eos" not in plain
    assert plain["stream_options"] == {"include_usage": True}
