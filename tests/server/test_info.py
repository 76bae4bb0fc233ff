"""Models, health, tokenising, metrics and the OpenAPI description.

Breaks for: routers, probes, dashboards and load generators that find a server by these.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from convserve.engine.messages import EngineStats, Times
from fake_engine import FakeEngine
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from collections.abc import Callable


async def test_models_are_listed_under_every_name(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine(), model_names=("org/tiny", "gpt")) as client:
        listed = (await client.get("/v1/models")).json()
        assert [card["id"] for card in listed["data"]] == ["org/tiny", "gpt"]
        assert listed["data"][1]["root"] == "org/tiny"
        assert listed["data"][0]["max_model_len"] == 256
        one = (await client.get("/v1/models/org/tiny")).json()
        assert one == listed["data"][0]
        reply = await client.post("/v1/completions", json={"model": "gpt", "prompt": "a"})
        assert reply.json()["model"] == "gpt"


async def test_probes(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    async with connect(engine, stale_seconds=5) as client:
        for path in ("/health", "/ping", "/ready"):
            reply = await client.get(path)
            assert (reply.status_code, reply.content) == (200, b"")
        assert (await client.head("/metrics")).status_code == 200
        assert (await client.get("/load")).json() == {"server_load": 0}
        assert re.fullmatch(r"\d+\.\d+\.\d+", (await client.get("/version")).json()["version"])
        engine.age = 6
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/ready")).status_code == 503


async def test_tokenize_and_back(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        reply = await client.post("/tokenize", json={"prompt": "h€", "return_token_strs": True})
        assert reply.json() == {
            "tokens": [104, 0xE2, 0x82, 0xAC],
            "count": 4,
            "max_model_len": 256,
            "token_strs": ["h", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"],
        }
        tokens = reply.json()["tokens"]
        reply = await client.post("/detokenize", json={"tokens": tokens})
        assert reply.json() == {"prompt": "h€"}
        messages = [{"role": "user", "content": "<|eos|>"}]
        reply = await client.post("/tokenize", json={"messages": messages})
        assert bytes(reply.json()["tokens"]) == b"user: <|eos|>\nassistant: "
        long = await client.post("/tokenize", json={"prompt": "x" * 10_000})
        assert long.json()["count"] == 10_000
        for body in ({}, {"prompt": "a", "messages": messages}, {"prompt": 3}):
            assert (await client.post("/tokenize", json=body)).status_code == 400
        for body in ({}, {"tokens": [259]}, {"tokens": [-1]}, {"tokens": "a"}):
            assert (await client.post("/detokenize", json=body)).status_code == 400


async def test_gateways_tokenize_in_their_form(connect: Callable[..., Any]) -> None:
    messages = [{"role": "user", "content": "€"}]
    async with connect(FakeEngine()) as client:
        reply = await client.post("/v1/tokenize", json={"model": "tiny", "prompt": "h€"})
        assert reply.json() == {"tokens": [104, 0xE2, 0x82, 0xAC], "count": 4, "char_count": 2}
        reply = await client.post("/v1/detokenize", json={"tokens": reply.json()["tokens"]})
        assert reply.json() == {"text": "h€"}
        counted = (await client.post("/v1/tokenize", json={"messages": messages})).json()
        assert bytes(counted["tokens"]).decode() == "user: €\nassistant: "
        assert (counted["count"], counted["char_count"]) == (21, 19)
        for path in ("/v1/tokenize", "/v1/detokenize"):
            assert (await client.post(path, json={})).status_code == 400
            unknown = {"model": "x", "tokens": [], "prompt": ""}
            assert (await client.post(path, json=unknown)).status_code == 404


async def test_probes_are_logged_only_when_they_fail(
    connect: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    async with connect(engine, stale_seconds=5) as client:
        with caplog.at_level(logging.INFO, "convserve.access"):
            for path in ("/health", "/ping", "/ready", "/metrics", "/stats", "/"):
                assert (await client.get(path)).status_code == 200
            assert not caplog.records
            engine.age = 6
            await client.get("/health")
        [record] = caplog.records
        assert record.facts["status"] == 503  # type: ignore[attr-defined]
        with caplog.at_level(logging.DEBUG, "convserve.access"):
            await client.get("/metrics")
    assert len(caplog.records) == 2


async def scrape(client: Any) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    return {
        sample.name + "".join(f"|{k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_what_happened(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("hello", cached=2)
    engine.info = msgspec.structs.replace(engine.info, page_time_edges=(1.0, 2.0))
    engine.totals = EngineStats(
        running=3, waiting=2, pages_total=64, pages_used=16, slots_total=4, slots_used=3,
        pages_kept=8, tails_total=5, tails_stored=4, tails_evicted=3, prefix_queries=50,
        prefix_hits=20, replayed_tokens=9,
        preemptions=1, prompt_tokens=100, generation_tokens=200, steps=9, step_seconds_total=0.5,
        graph_replays={1: 4, 16: 5}, padding_tokens=6, gpu_idle_seconds=1.5, corrupted_requests=2,
        page_lifetimes=Times((0, 3, 1), 7.5), page_idle_times=Times((1, 0, 0), 0.5),
    )  # fmt: skip
    async with connect(engine) as client:
        before = await scrape(client)
        await client.post("/v1/completions", json={"prompt": "abc", "n": 2, "max_tokens": 7})
        await client.post("/v1/completions", json={"prompt": ""})
        after = await scrape(client)
    assert after["convserve_graph_replay_total|model_name=tiny|padded_size=16"] == 5
    assert after["convserve_padding_tokens_total|model_name=tiny"] == 6
    for prefix, extra in (("convserve_", ""), ("vllm:", "|engine=0")):
        model = "|model_name=tiny"
        for name, value in {
            "time_to_first_token_seconds_count": 1,
            "inter_token_latency_seconds_count": 10,
            "request_time_per_output_token_seconds_count": 2,
            "e2e_request_latency_seconds_count": 1,
            "request_queue_time_seconds_count": 1,
            "request_queue_time_seconds_sum": 0.001,
            "request_prefill_time_seconds_sum": 0.002,
            "request_decode_time_seconds_count": 2,
            "request_inference_time_seconds_count": 2,
            "request_prompt_tokens_sum": 3,
            "request_generation_tokens_sum": 12,
            "request_params_max_tokens_sum": 7,
            "request_params_n_sum": 2,
            "prompt_tokens_cached_total": 2,
            "prompt_tokens_total": 100,
            "generation_tokens_total": 200,
            "prefix_cache_queries_total": 50,
            "prefix_cache_hits_total": 20,
            "corrupted_requests_total": 2,
            "request_prefill_kv_computed_tokens_sum": 1,
        }.items():
            assert after[f"{prefix}{name}{extra}{model}"] == pytest.approx(value), name
    assert after["vllm:num_requests_running|engine=0|model_name=tiny"] == 3
    assert after["vllm:num_requests_waiting|engine=0|model_name=tiny"] == 2
    assert after["vllm:kv_cache_usage_perc|engine=0|model_name=tiny"] == 0.25
    assert after["vllm:num_preemptions_total|engine=0|model_name=tiny"] == 1
    for ours, vllm, counts, seconds in (
        ("page_lifetime", "block_lifetime", [0, 3, 4], 7.5),
        ("page_idle_before_evict", "block_idle_before_evict", [1, 1, 1], 0.5),
        ("page_reuse_gap", "block_reuse_gap", [0, 0, 0], 0),
    ):
        for name, label in ((f"convserve_kv_{ours}", ""), (f"vllm:kv_{vllm}", "|engine=0")):
            found = [
                after[f"{name}_seconds_bucket{label}|le={edge}|model_name=tiny"]
                for edge in ("1.0", "2.0", "+Inf")
            ]
            assert found == counts, name
            assert after[f"{name}_seconds_sum{label}|model_name=tiny"] == seconds
    for name, value in {
        "gpu_idle_seconds_total": 1.5,
        "conv_slots_used": 3, "conv_slots_total": 4, "steps_total": 9, "replayed_tokens_total": 9,
        "kv_pages_used": 16, "kv_pages_kept": 8, "kv_pages_free": 40, "kv_pages_total": 64,
        "conv_tails_stored": 4, "conv_tails_total": 5, "conv_tails_evicted_total": 3,
    }.items():  # fmt: skip
        assert after[f"convserve_{name}|model_name=tiny"] == value, name
    finished = "vllm:request_success_total|engine=0|finished_reason={}|model_name=tiny"
    assert [before[finished.format(r)] for r in ("stop", "length", "abort", "error")] == [0] * 4
    assert after[finished.format("stop")] == 2
    http = "convserve_http_requests_total|model_name=tiny|route=/v1/completions|status={}"
    assert (before[http.format(400)], after[http.format(400)]) == (0, 1)
    assert (before[http.format(500)], after[http.format(500)]) == (0, 0)
    assert set(before) <= set(after)


async def test_edges_see_steps_of_a_millisecond(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        found = await scrape(client)
    edges = [
        float(label.partition("=")[2])
        for key in found
        if key.startswith("convserve_inter_token_latency_seconds_bucket")
        for label in key.split("|")
        if label.startswith("le=")
    ]
    assert edges[:4] == [5e-5, 1e-4, 2e-4, 5e-4]
    assert edges[-3:] == [50.0, 60.0, float("inf")]
    aliases = [key for key in found if key.startswith("vllm:inter_token_latency_seconds_bucket")]
    assert len(aliases) == 20


async def test_every_step_is_counted_between_two_scrapes(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("")
    async with connect(engine) as client:
        for steps, rows in ((1, 100), (2, 3), (2, 3), (3, 3)):
            engine.totals = EngineStats(
                steps=steps,
                step_tokens=rows,
                step_sequences=3,
                step_seconds=0.001,
                scheduler_seconds=0.0001,
            )
            engine.step()
        found = await scrape(client)
    ours, vllm = "model_name=tiny", "engine=0|model_name=tiny"
    for name, label in (
        ("convserve_step_batch_tokens", ours), ("vllm:iteration_tokens_total", vllm),
    ):  # fmt: skip
        assert found[f"{name}_count|{label}"] == 3
        assert found[f"{name}_sum|{label}"] == 106
    assert found[f"convserve_step_batch_size_sum|{ours}"] == 9
    for kind, seconds in (("decode", 0.002), ("mixed", 0.001)):
        name = f"convserve_step_duration_seconds_sum|kind={kind}|{ours}"
        assert found[name] == pytest.approx(seconds)
    assert found[f"convserve_step_scheduler_seconds_sum|{ours}"] == pytest.approx(0.0003)


async def test_routes_are_timed_and_the_process_is_watched(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        name = "convserve_http_request_duration_seconds_count|model_name=tiny|route="
        before = await scrape(client)
        await client.get("/v1/models/tiny")
        after = await scrape(client)
    assert before[name + "/v1/completions"] == 0
    assert after[name + "/v1/models/{name:path}"] == 1
    assert {"process_open_fds", "process_resident_memory_bytes"} <= set(after)
    assert (
        "vllm:cache_config_info|block_size=16|engine=0|model_name=tiny|num_gpu_blocks=64" in after
    )
    assert [key for key in after if key.startswith("vllm:lora_requests_info|")]


async def test_vllms_names_can_be_turned_off(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine(), vllm_metrics=False) as client:
        assert not [key for key in await scrape(client) if key.startswith("vllm")]


async def test_a_counter_never_goes_back(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    key = "convserve_generation_tokens_total|model_name=tiny"
    seen = []
    async with connect(engine) as client:
        for total in (5, 3, 4, 9):
            engine.totals = EngineStats(generation_tokens=total)
            seen.append((await scrape(client))[key])
    assert seen == [5, 5, 6, 11]


def references(node: Any) -> set[str]:
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


async def test_the_openapi_description_is_whole(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        schema = (await client.get("/openapi.json")).json()
    names = {ref.removeprefix("#/components/schemas/") for ref in references(schema)}
    assert names <= set(schema["components"]["schemas"])
    operation = schema["paths"]["/v1/completions"]["post"]
    assert set(operation["responses"]) >= {"200", "400", "401", "404", "413", "415", "429", "503"}
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "logprobs", "stop", "min_p"} <= set(fields)
    assert msgspec.json.encode(schema)


async def test_every_example_of_the_description_is_answered(connect: Callable[..., Any]) -> None:
    engine = FakeEngine("hi")
    async with connect(engine) as client:
        schema = (await client.get("/openapi.json")).json()
        sent = 0
        for path, operations in schema["paths"].items():
            body = operations.get("post", {}).get("requestBody")
            examples = body["content"]["application/json"]["examples"] if body else {}
            for name, example in examples.items():
                asked = dict(example["value"])
                for limit in asked.keys() & {"max_tokens", "max_completion_tokens"}:
                    asked[limit] = min(asked[limit], 8)
                if "tools" in asked:  # bytes are tokens here, and the context has 256
                    asked["truncate_prompt_tokens"] = 100
                reply = await client.post(path, json=asked)
                assert reply.status_code == 200, (path, name, reply.text)
                sent += 1
    assert sent >= 15
