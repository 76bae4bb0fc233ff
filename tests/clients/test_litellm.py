"""LiteLLM's three ways to an OpenAI-compatible server say what the server says.

Breaks for: whoever routes to convserve through a LiteLLM proxy or library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable

    from running import Served

CALLS = Path(__file__).with_name("litellm_calls.py")


def test_every_way_says_the_same(
    server: Served, tool: Callable[..., str], run_tool: Callable[..., str]
) -> None:
    tool("litellm")
    output = run_tool(
        [tool("python"), str(CALLS), server.url, server.model], LITELLM_LOCAL_MODEL_COST_MAP="True"
    )
    found = json.loads(output.splitlines()[-1])
    common = {"model": server.model, "temperature": 0, "max_tokens": 24}
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as http:
        messages = [{"role": "user", "content": "Name three colours."}]
        chat = http.post("/chat/completions", json={"messages": messages, **common}).json()
        text = http.post("/completions", json={"prompt": "The capital of France is", **common})
    said = chat["choices"][0]["message"]["content"]
    for way in ("hosted_vllm", "openai", "openai, async"):
        assert found[way] == [said, said]
    assert found["text-completion-openai"] == [text.json()["choices"][0]["text"]] * 2
