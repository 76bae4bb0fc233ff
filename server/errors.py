"""Errors as clients see them: one exception type, one table of kinds, one JSON shape.

Knows nothing of routes. Nothing here quotes a path, a trace or more than a line of what was sent.
"""

from __future__ import annotations

import re

import msgspec
from starlette.responses import Response

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    414: "URLTooLongError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "HeadersTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_MAX_MESSAGE = 500
_FIELD = re.compile(r"[a-z_]+(\.[a-z_]+)*")


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    """The request field at fault."""
    code: int | str
    """The HTTP status, or a name where OpenAI has one (`model_not_found`)."""


class ErrorReply(msgspec.Struct, frozen=True):
    """The body of every reply that is not a success, and of an error event in a stream."""

    error: ErrorDetail


class ApiError(Exception):
    """Ends a request with `status` and the error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = headers or {}

    def detail(self) -> ErrorDetail:
        """What is told of it, of bounded size."""
        message = " ".join(str(self).split())
        if len(message) > _MAX_MESSAGE:
            message = message[: _MAX_MESSAGE - 3] + "..."
        kind = _TYPES.get(self.status, "APIError")
        return ErrorDetail(message, kind, self.param, self.code or self.status)

    def body(self) -> bytes:
        """The JSON body."""
        return msgspec.json.encode(ErrorReply(self.detail()))

    def response(self) -> Response:
        """The reply, when nothing has been sent yet."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def bad_request(field: str | None, message: str) -> ApiError:
    """400 naming the field; `message` is worded without it."""
    return ApiError(400, f"{field}: {message}" if field else message, param=field)


def from_value_error(error: ValueError) -> ApiError:
    """400 from a message worded `field: what is wrong`."""
    field, separator, _ = str(error).partition(": ")
    is_field = bool(separator) and _FIELD.fullmatch(field) is not None
    return ApiError(400, str(error), param=field if is_field else None)


def overloaded(retry_after: int) -> ApiError:
    """429: more is waiting than the server takes."""
    return ApiError(
        429,
        "too many requests are waiting; try again later",
        headers={"Retry-After": str(retry_after)},
    )


def draining() -> ApiError:
    """503: the server is on its way out."""
    return ApiError(503, "the server is shutting down", headers={"Retry-After": "5"})


def engine_dead() -> ApiError:
    """503: the engine is gone."""
    return ApiError(503, "the engine has stopped", headers={"Retry-After": "5"})


def internal(request_id: str) -> ApiError:
    """500 that can be found in the log by its id, and tells nothing else."""
    return ApiError(500, f"internal error; the server's log has more under {request_id}")
