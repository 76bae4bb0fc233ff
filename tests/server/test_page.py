"""The page's bytes and headers, and the figures that it asks for.

Breaks for: whoever opens the server in a browser, and whoever trusts that nothing can run there but
what we wrote.
"""

from __future__ import annotations

import base64
import hashlib
import re
from typing import TYPE_CHECKING, Any

from convserve.engine.messages import EngineStats
from fake_engine import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable


def policy(header: str) -> dict[str, str]:
    return dict(part.strip().split(" ", 1) for part in header.split(";"))


async def test_one_file_that_nothing_can_be_added_to(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        reply = await client.get("/")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["x-content-type-options"] == "nosniff"
    allowed = policy(reply.headers["content-security-policy"])
    for tag, directive in (("style", "style-src"), ("script", "script-src")):
        [inline] = re.findall(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert allowed.pop(directive) == f"'sha256-{digest}'"
    assert allowed.pop("connect-src") == "'self'"
    assert allowed.pop("img-src") == "data:"
    assert allowed.pop("require-trusted-types-for") == "'script'"
    assert set(allowed.values()) == {"'none'"}
    outside = re.findall(r"""(?:src|href)\s*=\s*(?!["']data:)|@import|url\(""", reply.text)
    assert not outside
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|%[A-Z]+%", reply.text)
    assert " style=" not in reply.text
    assert " on" not in "".join(re.findall(r"<[a-z][^>]*>", reply.text.split("<script>")[0]))


async def test_a_browser_that_has_it_is_not_sent_it_again(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine()) as client:
        first = await client.get("/")
        again = await client.get("/", headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (await client.head("/")).status_code == 200
        assert (await client.post("/")).status_code == 405


async def test_it_is_open_where_there_are_keys_and_what_it_asks_for_is_not(
    connect: Callable[..., Any],
) -> None:
    async with connect(FakeEngine(), api_keys=("k",)) as client:
        assert (await client.get("/")).status_code == 200
        for path in ("/stats", "/server_info", "/v1/models"):
            assert (await client.get(path)).status_code == 401
            assert (
                await client.get(path, headers={"Authorization": "Bearer k"})
            ).status_code == 200


async def test_it_can_be_turned_off(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine(), page=False) as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/stats")).status_code == 200
    async with connect(FakeEngine(), page=False, api_keys=("k",)) as client:
        assert (await client.get("/")).status_code == 401


async def test_what_is_served_is_told_without_its_folder(connect: Callable[..., Any]) -> None:
    async with connect(FakeEngine(), model_names=("tiny", "other")) as client:
        reply = await client.get("/server_info")
    info = reply.json()
    assert (info["model"], info["models"], info["chat"]) == ("tiny", ["tiny", "other"], True)
    assert (info["max_model_len"], info["num_pages"], info["conv"]) == (256, 64, "none")
    assert set(info["defaults"]) >= {"temperature", "top_p", "top_k", "min_p"}
    assert "secret" not in reply.text


async def test_figures_of_the_moment(connect: Callable[..., Any]) -> None:
    engine = FakeEngine()
    engine.totals = EngineStats(running=3, waiting=2, steps=9, step_tokens=5, tails_stored=4)
    async with connect(engine) as client:
        first = await client.get("/stats")
        now = (await client.get("/stats")).json()
        engine.die()
        after = (await client.get("/stats")).json()
    assert first.headers["cache-control"] == "no-store"
    assert (now["running"], now["waiting"], now["steps"], now["step_tokens"]) == (3, 2, 9, 5)
    assert (now["alive"], now["ready"], now["draining"]) == (True, True, False)
    assert now["time"] > first.json()["time"]
    assert (after["alive"], after["ready"]) == (False, False)
