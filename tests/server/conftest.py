"""A served fake engine, and clients of it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from convserve.server.app import create_app
from convserve.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from convserve.engine.client import EngineClient
    from fastapi import FastAPI

TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"


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
        transport = httpx.ASGITransport(make_app(engine, **options))
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers=headers
        ) as client:
            yield client

    return connected
