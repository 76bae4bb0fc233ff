"""The whole app over a real engine of this process, with tiny random weights, and a canary in it.

A canary is an ordinary request whose tokens must come out the same whatever is sent beside it.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import torch
from asgi_call import AsgiCall, events
from convserve.engine.config import EngineConfig
from convserve.engine.local import LocalClient
from convserve.engine.start import start_engine
from convserve.server.app import create_app
from convserve.server.settings import ServerSettings
from golden import GOLDEN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastapi import FastAPI

FOLDER = GOLDEN / "models" / "dynconv_lowrank_qkv"
PATH = "/v1/completions"
CANARY: dict[str, Any] = {
    "prompt": "A canary sings in the mine, and goes on singing.",
    "max_tokens": 24,
    "temperature": 0.8,
    "seed": 11,
    "ignore_eos": True,
    "return_token_ids": True,
    "cache_salt": "canary",
}


class RealApp:
    """An app, its engine, and a client of both."""

    def __init__(self, app: FastAPI, engine: LocalClient, client: httpx.AsyncClient) -> None:
        self.app = app
        self.engine = engine
        self.client = client
        self.headers = {"content-type": "application/json"}
        self.song: list[int] = []
        """What the canary says when it is alone."""

    @property
    def is_idle(self) -> bool:
        """Nothing is live, neither in the server nor, as far as it told, in the engine."""
        stats = self.engine.stats
        live = self.app.state.service.lifecycle.live
        return live == stats.running == stats.waiting == stats.pages_used == stats.slots_used == 0

    async def post(self, body: dict[str, Any], path: str = PATH) -> httpx.Response:
        return await self.client.post(path, json=body, headers=self.headers)

    async def sing(self) -> list[int]:
        reply = await self.post(CANARY)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["token_ids"]

    @asynccontextmanager
    async def beside_canary(self) -> AsyncIterator[None]:
        """The canary sings in a stream while the body runs, and must not have noticed."""
        call = AsgiCall(self.app, "POST", PATH, {**CANARY, "stream": True}, self.headers)
        await call.until(b"token_ids")
        yield
        found = events(await call.finish())
        assert found.pop() == "[DONE]"
        assert "error" not in found[-1], found[-1]
        tokens = [token for event in found for token in event["choices"][0]["token_ids"]]
        assert tokens == self.song, "what was sent beside it changed the canary's bytes"


@asynccontextmanager
async def real_app(keys: tuple[str, ...] = (), **options: Any) -> AsyncIterator[RealApp]:
    """Serves the model; with keys, the first is the canary's."""
    config = EngineConfig(model=str(FOLDER), memory="24MiB", max_num_seqs=8, threads=1)
    threads = torch.get_num_threads()
    core, info = start_engine(config)
    engine = LocalClient(core, info)
    settings = ServerSettings(model_names=("tiny",), api_keys=keys, **options)
    app = create_app(engine, FOLDER, settings)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
        served = RealApp(app, engine, client)
        if keys:
            served.headers["authorization"] = f"Bearer {keys[0]}"
        served.song = await served.sing()
        yield served
    await app.state.service.close()
    await engine.close()
    core.abort_all()
    core.check_integrity()
    torch.set_num_threads(threads)
