"""Reading a request's JSON body within its bounds.

Knows nothing of what bodies say.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

import msgspec

from .errors import ApiError
from .parsing import parse

if TYPE_CHECKING:
    from starlette.requests import Request

    from .settings import ServerSettings

T = TypeVar("T", bound=msgspec.Struct)


async def read_body(request: Request, kind: type[T], settings: ServerSettings) -> T:
    """The body as `kind`.

    Raises:
        ApiError: 400 not JSON or a bad field, 408 too slow, 413 too large, 415 another type.
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, "Content-Type must be application/json")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > settings.max_body):
        raise _too_large(settings)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for piece in request.stream():
                size += len(piece)
                if size > settings.max_body:
                    raise _too_large(settings)
                pieces.append(piece)
    except TimeoutError:
        raise ApiError(
            408, f"the body did not arrive in {settings.body_seconds:g} s", headers=_CLOSE
        ) from None
    return parse(b"".join(pieces), kind)


_CLOSE = {"Connection": "close"}


def _too_large(settings: ServerSettings) -> ApiError:
    return ApiError(
        413, f"the body has more than the {settings.max_body} bytes allowed", headers=_CLOSE
    )
