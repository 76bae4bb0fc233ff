"""The page at `/`: one self-contained file to try the model on and to watch the engine with.

Knows nothing of what the page does. Its markup, style and scripts are put together once; the
content security policy names exactly that style and script, and allows nothing else to load, to
run, or to be read as HTML.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import NamedTuple

from fastapi import FastAPI, Request
from starlette.responses import Response

PAGE_PATH = "/"
_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = ("api.js", "tokens.js", "charts.js", "engine.js", "page.js")
"""In the order in which they build on each other."""


class Page(NamedTuple):
    """What goes over the wire."""

    body: bytes
    headers: dict[str, str]


def assemble() -> Page:
    """The page and the headers that confine it."""
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    script = "\n".join([(_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS])
    html = (_ASSETS / "page.html").read_text(encoding="utf-8")
    body = html.replace("%STYLE%", style).replace("%SCRIPT%", script).encode()
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return Page(
        body,
        {
            "Content-Security-Policy": "; ".join(f"{name} {of}" for name, of in policy.items()),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-cache",
            "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        },
    )


def add_page_route(app: FastAPI) -> None:
    """Serves the page, to whoever asks: it holds nothing that is secret."""
    page = assemble()

    async def show(request: Request) -> Response:
        if request.headers.get("if-none-match") == page.headers["ETag"]:
            return Response(status_code=304, headers=page.headers)
        return Response(page.body, media_type="text/html", headers=page.headers)

    app.add_api_route(PAGE_PATH, show, methods=["GET", "HEAD"], include_in_schema=False)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
