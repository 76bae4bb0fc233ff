"""What the engine is and does, as small JSON: `/server_info` once, `/stats` as often as one likes.

Knows nothing of who reads it. /metrics has the same figures for Prometheus, with histories.
"""

from __future__ import annotations

import importlib.metadata
import time
from typing import TYPE_CHECKING

import msgspec
from starlette.responses import Response

from .openapi import described

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .service import Service

_PRIVATE = ("model",)
"""Facts of the engine that nobody outside needs: the folder it loaded."""


def add_stats_routes(app: FastAPI, service: Service) -> None:
    """Two routes that a page can ask without work for the engine."""
    version = importlib.metadata.version("convserve")

    @app.get("/server_info", **described(None, None, media_type="application/json"))
    async def server_info() -> Response:
        """What is served, on what, with what memory, and what the model's defaults are."""
        facts = msgspec.structs.asdict(service.info)
        for name in _PRIVATE:
            del facts[name]
        return _json(
            {
                "version": version,
                "model": service.model,
                "models": service.settings.model_names,
                "chat": service.prompts.has_chat_template,
                "defaults": service.defaults,
                **facts,
            }
        )

    @app.get("/stats", **described(None, None, media_type="application/json"))
    async def stats() -> Response:
        """The engine's latest figures; counters since it started."""
        lifecycle = service.lifecycle
        return _json(
            {
                "time": time.monotonic(),
                "alive": service.client.is_alive,
                "ready": lifecycle.is_ready,
                "draining": lifecycle.is_draining,
                "live_sequences": lifecycle.live,
                **msgspec.structs.asdict(service.client.stats),
            }
        )


def _json(value: object) -> Response:
    return Response(
        msgspec.json.encode(value),
        media_type="application/json",
        headers={"Cache-Control": "no-store"},
    )
