"""Run by the clients' own Python: the same question by each of LiteLLM's ways to reach a server.

python litellm_calls.py URL MODEL        (prints one JSON object: way -> [whole, streamed])
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import litellm  # pyright: ignore[reportMissingImports]

PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours."}]


def chat(name: str, **common: Any) -> list[str]:
    whole = litellm.completion(model=name, messages=MESSAGES, **common)
    pieces = litellm.completion(model=name, messages=MESSAGES, stream=True, **common)
    return [
        whole.choices[0].message.content,
        "".join(piece.choices[0].delta.content or "" for piece in pieces),
    ]


async def chat_async(name: str, **common: Any) -> list[str]:
    whole = await litellm.acompletion(model=name, messages=MESSAGES, **common)
    text = ""
    async for piece in await litellm.acompletion(
        model=name, messages=MESSAGES, stream=True, **common
    ):
        text += piece.choices[0].delta.content or ""
    return [whole.choices[0].message.content, text]


def text(name: str, **common: Any) -> list[str]:
    whole = litellm.text_completion(model=name, prompt=PROMPT, **common)
    pieces = litellm.text_completion(model=name, prompt=PROMPT, stream=True, **common)
    return [whole.choices[0].text, "".join(piece.choices[0].text or "" for piece in pieces)]


def main(url: str, model: str) -> None:
    litellm.telemetry = False
    common = {"api_base": f"{url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 24}
    found = {
        "hosted_vllm": chat(f"hosted_vllm/{model}", **common),
        "openai": chat(f"openai/{model}", **common),
        "openai, async": asyncio.run(chat_async(f"openai/{model}", **common)),
        "text-completion-openai": text(f"text-completion-openai/{model}", **common),
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
