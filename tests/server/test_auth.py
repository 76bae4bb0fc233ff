"""Keys, ids and labels: nothing but probes is open, and no client's text reaches a header or log.

Breaks for: operators whose server is reachable by others.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
from asgi_call import AsgiCall
from fake_engine import FakeEngine
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Callable

KEYS = ("first-key", "second-key")
OPEN = {"/", "/health", "/ready", "/ping"}


@pytest.mark.parametrize("metrics_need_key", [True, False])
async def test_every_route_but_the_open_ones_wants_a_key(
    serve: Callable[..., Any], metrics_need_key: bool
) -> None:
    app = serve(FakeEngine(), api_keys=KEYS, metrics_need_key=metrics_need_key)
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    assert len(paths) >= 12
    for path in [*paths, "//", "/docs", "/nothing", "//health", "/health/", "/v1/../health"]:
        for method in ("GET", "POST", "OPTIONS", "DELETE"):
            call = AsgiCall(app, method, path.replace("{name:path}", "tiny"))
            await call.finish()
            is_open = path in OPEN or (path == "/metrics" and not metrics_need_key)
            assert (call.status != 401) == is_open, (method, path, call.status)
            if not is_open:
                assert call.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first-key", 200),
        ("Bearer second-key", 200),
        ("bearer second-key", 200),
        ("Bearer first-ke", 401),
        ("Bearer first-keyy", 401),
        ("Bearer ", 401),
        ("Bearer", 401),
        ("first-key", 401),
        ("Basic first-key", 401),
        ("Bearer first-key second-key", 401),
        ("Bearer ключ", 401),
        ("", 401),
    ],
)
async def test_which_headers_open(serve: Callable[..., Any], header: str, status: int) -> None:
    headers = {"authorization": header}
    call = AsgiCall(serve(FakeEngine(), api_keys=KEYS), "GET", "/v1/models", headers=headers)
    await call.finish()
    assert call.status == status


async def test_without_keys_any_header_will_do(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine(), headers={"Authorization": "Bearer "}) as client:
        assert (await client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("label", "kept"),
    [
        ("req-1.a:b/c=", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("a b", False),
        ("a\r\nx: y", False),
        ("é", False),
        ("", False),
    ],
)
async def test_a_clients_request_id_is_a_label_if_it_is_clean(
    serve: Callable[..., Any], label: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeEngine()
    headers = {"content-type": "application/json", "x-request-id": label}
    with caplog.at_level(logging.INFO, "convserve.access"):
        call = AsgiCall(serve(engine), "POST", "/v1/completions", {"prompt": "a"}, headers)
        await call.finish()
    assert (call.headers["x-request-id"] == label) == kept
    [record] = caplog.records
    facts = record.facts  # type: ignore[attr-defined]
    assert facts.get("label") == (label if kept else None)
    assert engine.submitted[0].request_id.startswith(facts["id"])
    assert facts["id"] != label


async def test_the_log_line_of_a_request(
    connect: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(FakeEngine("hi")) as client:
        with caplog.at_level(logging.INFO, "convserve.access"):
            await client.post(
                "/v1/completions", json={"prompt": "abc", "user": "me", "request_id": "r1"}
            )
            await client.post("/v1/completions", json={"prompt": "a", "user": "a\nb"})
            await client.get("/nothing/secret")
    first, second, third = (record.facts for record in caplog.records)  # type: ignore[attr-defined]
    assert {name: first[name] for name in ("route", "status", "user", "label", "finish")} == {
        "route": "/v1/completions",
        "status": 200,
        "user": "me",
        "label": "r1",
        "finish": "stop",
    }
    assert (first["prompt_tokens"], first["completion_tokens"]) == (3, 3)
    assert 0 <= first["ttft"] <= first["seconds"]
    assert "user" not in second
    assert third["route"] == "other"


async def test_pages_of_other_origins_may_call_only_if_told_so(connect: Callable[..., Any]) -> None:
    origin = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
    async with connect(FakeEngine()) as client:
        reply = await client.options("/v1/completions", headers=origin)
        assert "access-control-allow-origin" not in reply.headers
    keys = {"api_keys": KEYS, "cors_origins": ("https://chat.example",)}
    async with connect(FakeEngine(), **keys) as client:
        reply = await client.options("/v1/completions", headers=origin)
        assert reply.status_code == 200
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        reply = await client.options(
            "/v1/completions", headers={**origin, "Origin": "https://other.example"}
        )
        assert "access-control-allow-origin" not in reply.headers
