"""The ASGI application around an engine that is ready.

Knows nothing of processes, ports or signals: serve.py runs it, tests call it directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import time
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .errors import ApiError
from .middleware import KeyCheck, RequestRecords
from .openapi import describe
from .page import PAGE_PATH, add_page_route
from .routes_generate import add_generation_routes
from .routes_info import add_info_routes, add_text_routes
from .routes_stats import add_stats_routes
from .service import Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from starlette.requests import Request
    from starlette.responses import Response

    from ..engine.client import EngineClient
    from .metrics import Metrics
    from .settings import ServerSettings
    from .tracing import RequestTraces

OPEN_PATHS = ("/health", "/ready", "/ping")
"""Routes that never want a key: probes have none."""
_LAG_SECONDS = 0.1


def create_app(
    client: EngineClient,
    folder: Path,
    settings: ServerSettings,
    traces: RequestTraces | None = None,
) -> FastAPI:
    """An app that serves `client`, whose model's text files are in `folder`.

    The `Service` is at `app.state.service`. The app owns neither `client` nor `traces`: whoever
    made them closes them.

    Raises:
        ValueError: one line naming the file of `folder` that is not usable.
    """
    service = Service(client, folder, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Metrics]]:
        lag = asyncio.create_task(_watch_lag(service.metrics))
        yield {"metrics": service.metrics}  # connections count there
        lag.cancel()
        await service.close()

    app = FastAPI(
        title="convserve",
        description="OpenAI-compatible inference for language models with convolution state.",
        version=importlib.metadata.version("convserve"),
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    app.openapi = lambda: describe(app)
    add_generation_routes(app, service)
    add_text_routes(app, service)
    add_info_routes(app, service)
    add_stats_routes(app, service)
    if settings.page:
        add_page_route(app)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_exception)
    if settings.api_keys:
        open_paths = {*OPEN_PATHS}
        if not settings.metrics_need_key:
            open_paths.add("/metrics")
        if settings.page:
            open_paths.add(PAGE_PATH)
        app.add_middleware(KeyCheck, keys=settings.api_keys, open_paths=open_paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
        )
    app.add_middleware(RequestRecords, metrics=service.metrics, traces=traces)
    return app


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_exception(_: Request, error: Exception) -> Response:
    """The router's own refusals: no such path, wrong method."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, error.detail, headers=dict(error.headers or {})).response()


async def _watch_lag(metrics: Metrics) -> None:
    while True:
        started = time.perf_counter()
        await asyncio.sleep(_LAG_SECONDS)
        late = time.perf_counter() - started - _LAG_SECONDS
        metrics.event_loop_lag.observe(max(late, 0.0))
