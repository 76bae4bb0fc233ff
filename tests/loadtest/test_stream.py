"""Reading streams: however the network cuts them, the same tokens arrive."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from convserve.loadtest.scrape import parse_metrics
from convserve.loadtest.stream import EnoughTokens, MalformedError, StreamSink
from hypothesis import given
from hypothesis import strategies as st

HEADERS = {"content-type": "text/event-stream; charset=utf-8"}


def chunk(**fields):
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def opened(**options):
    sink = StreamSink(**options)
    sink.on_headers(0.0, 200, HEADERS)
    return sink


STREAM = b"".join(
    [
        b": keep-alive\n\n",
        chunk(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}]),
        chunk(choices=[{"index": 0, "delta": {"content": "hé"}, "token_ids": [5, 6]}]),
        chunk(choices=[{"index": 0, "delta": {"content": ""}, "token_ids": [7]}]),
        b"event: x\r\nid: 4\r\ndata: "
        + msgspec.json.encode({"choices": [{"delta": {"content": "\n\n"}, "token_ids": [8]}]})
        + b"\r\n\r\n",
        chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], usage=None),
        chunk(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 4}),
        b"data: [DONE]\n\n",
    ]
)


@given(st.lists(st.integers(1, len(STREAM) - 1), max_size=12))
def test_any_cut_of_the_bytes_gives_the_same_tokens(cuts):
    sink = opened(keep_output=True)
    edges = [0, *sorted(set(cuts)), len(STREAM)]
    for stamp, (begin, end) in enumerate(itertools.pairwise(edges), 1):
        sink.on_body(float(stamp), STREAM[begin:end])
    assert "".join(sink.text) == "hé\n\n"
    assert sink.token_ids == [5, 6, 7, 8]
    assert sink.chunk_counts == [2, 1, 1]
    assert sink.done == float(len(edges) - 1)
    assert (sink.basis, sink.output_tokens, sink.finish_reason) == ("ids", 4, "stop")


def test_a_role_is_not_a_token():
    """TTFT is the first token, not the first event."""
    sink = opened()
    sink.on_body(1.0, chunk(choices=[{"delta": {"role": "assistant", "content": ""}}]))
    assert sink.chunk_stamps == []
    sink.on_body(2.0, chunk(choices=[{"delta": {"content": "a"}}]))
    assert sink.chunk_stamps == [2.0]


@pytest.mark.parametrize("delta", [{"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}])
def test_reasoning_and_tool_calls_are_tokens(delta):
    sink = opened()
    sink.on_body(1.0, chunk(choices=[{"delta": delta}]))
    assert sink.tokens == 1


def test_final_usage_on_the_finish_chunk_is_not_a_running_count():
    sink = opened()
    for k in range(3):
        sink.on_body(float(k), chunk(choices=[{"text": "a"}]))
    usage = {"completion_tokens": 3}
    sink.on_body(3.0, chunk(choices=[{"text": "", "finish_reason": "length"}], usage=usage))
    assert sink.chunk_counts == [1, 1, 1]
    assert sink.basis == "count"


def test_running_usage_counts_tokens_of_merged_chunks():
    sink = opened()
    for stamp, total in enumerate((0, 1, 4)):
        sink.on_body(
            float(stamp), chunk(choices=[{"text": "ab"}], usage={"completion_tokens": total})
        )
    assert sink.chunk_counts == [1, 3]
    assert sink.basis == "usage"


def test_cancellation_stops_at_the_token_it_names():
    sink = opened(cancel_after=2)
    sink.on_body(0.0, chunk(choices=[{"text": "a"}]))
    with pytest.raises(EnoughTokens):
        sink.on_body(1.0, chunk(choices=[{"text": "b"}]) + chunk(choices=[{"text": "c"}]))
    assert sink.tokens == 2


def test_errors_are_kept_as_text_and_bounded():
    sink = opened()
    sink.on_body(0.0, chunk(error={"message": "out of pages", "code": 500}))
    assert sink.error == "out of pages"
    with pytest.raises(MalformedError):
        opened().on_body(0.0, b"data: {nope\n\n")
    refused = StreamSink()
    refused.on_headers(0.0, 400, {"content-type": "application/json"})
    refused.on_body(0.0, b'{"error":{"message":"' + b"x" * 9000 + b'"}}')
    assert len(refused.http_error) <= 200


def test_metrics_pages_are_summed_over_labels():
    values, kinds = parse_metrics(
        "# HELP a b\n# TYPE a gauge\na{engine=\"0\"} 2\na{engine=\"1\"} 3 1700000000\n"
        "# TYPE h histogram\nh_bucket{le=\"1\"} 4\nh_sum 2.5\nh_count 4\n"
        "python_gc_total 9\nbroken\nn NaN\nx_created 1\n"
    )  # fmt: skip
    assert values["a"] == 5
    assert (values["h_sum"], values["h_count"]) == (2.5, 4)
    assert not {"python_gc_total", "h_bucket", "x_created"} & set(values)
    assert kinds["a"] == "gauge"
