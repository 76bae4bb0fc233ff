"""A served fake engine, and clients of it."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import openai
import pytest
from convserve.server.app import create_app
from convserve.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from convserve.engine.client import EngineClient
    from fastapi import FastAPI

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Puts loggers back as they were: commands configure them for the whole process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers = handlers
    root.setLevel(level)  # not by assignment: loggers remember what is enabled
    logging.getLogger("convserve.access").disabled = False
    logging.getLogger("convserve").setLevel(logging.NOTSET)
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)


def make_app(engine: EngineClient, folder: Path = TOKENIZER, **options: Any) -> FastAPI:
    return create_app(engine, folder, ServerSettings(**{"model_names": ("tiny",), **options}))


@pytest.fixture
def serve() -> Callable[..., FastAPI]:
    """serve(engine, folder=..., **settings) -> app"""
    return make_app


@pytest.fixture
def connect() -> Callable[..., Any]:
    """connect(engine, headers=..., folder=..., **settings) -> async context of an httpx client"""

    @asynccontextmanager
    async def connected(
        engine: EngineClient, headers: dict[str, str] | None = None, **options: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        app = make_app(engine, **options)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers
        ) as client:
            yield client
        await app.state.service.close()

    return connected


@pytest.fixture
async def openai_client() -> AsyncIterator[Callable[..., openai.AsyncOpenAI]]:
    """openai_client(engine, key=..., **settings) -> OpenAI's own client of a served engine"""
    apps: list[FastAPI] = []

    def made(engine: EngineClient, key: str = "k", **options: Any) -> openai.AsyncOpenAI:
        apps.append(make_app(engine, api_keys=("k",), **options))
        transport = httpx.ASGITransport(apps[-1])
        return openai.AsyncOpenAI(
            base_url="http://test/v1",
            api_key=key,
            max_retries=0,
            http_client=cast("Any", httpx.AsyncClient(transport=transport)),
        )

    yield made
    for app in apps:
        await app.state.service.close()
