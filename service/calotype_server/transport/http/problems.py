"""Errors over HTTP: all in the format of OpenAI's API, with additional fields.

A browser's EventSource stops for good when it receives any status other than 200. So if a retry helps, its GET requests
get an event named `waiting` with the error, and close; the EventSource then reconnects after the delay of the event.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from sse_starlette import ServerSentEvent
from starlette.exceptions import HTTPException

from calotype_server.errors import GenerationError, GenerationFailed, InvalidRequest, ServiceError, Violation
from calotype_server.observability.events import CallRefused, Observe, ignore
from calotype_server.transport.http.methods import allowed_methods
from calotype_server.transport.http.parsing import sentence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI, Request

__all__ = [
    "ERRORS",
    "describe",
    "error_response",
    "handle_errors",
    "http_error",
    "is_event_source",
    "waiting_event",
]

# As mapped by google.rpc.Code, https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
_STATUSES = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "DEADLINE_EXCEEDED": 504,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "PERMISSION_DENIED": 403,
    "UNAUTHENTICATED": 401,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 400,
    "UNAVAILABLE": 503,
}
_BY_REASON = {"REQUEST_TOO_LARGE": 413, "REQUEST_TOO_LATE": 408}
_NAMES = {404: "NOT_FOUND", 405: "UNIMPLEMENTED"}
_EVENTS = "text/event-stream"
_MIN_RECONNECT_MILLISECONDS = 1000
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Fault(BaseModel):
    """One violation in a request."""

    field: str = Field(description="Name of the field; dots lead into objects.")
    description: str = Field(description="What is wrong with it.")


class ErrorDetail(BaseModel):
    """Description of an error."""

    message: str = Field(description="One sentence for people.")
    type: str = Field(
        description="As in OpenAI's API: invalid_request_error, rate_limit_error, server_error, and so on."
    )
    param: str | None = Field(description="The first invalid field, if there is one.")
    code: str = Field(description="Machine-readable, in UPPER_SNAKE_CASE, the same as `ErrorInfo.reason` over gRPC.")
    status: str = Field(description="Name of the gRPC status code, such as INVALID_ARGUMENT.")
    violations: list[Fault] = Field(default=[], description="All violations in the request.")
    retry_after: float | None = Field(default=None, description="Seconds to wait before a retry.")
    metadata: dict[str, str] = Field(default={}, description="Machine-readable details.")


class Problem(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": Problem, "description": "Rejected: `error.violations` lists all violations."},
    "5XX": {"model": Problem, "description": "The server failed; the request is not the cause."},
}
"""Error responses of every operation, for OpenAPI."""


def describe(error: ServiceError) -> dict[str, Any]:
    """Returns an error as the JSON of `Problem`."""
    violations = error.violations if isinstance(error, InvalidRequest) else ()
    detail = ErrorDetail(
        message=error.message,
        type=_type(_status(error)),
        param=violations[0].field if violations else None,
        code=error.reason,
        status=error.code,
        violations=[Fault(field=each.field, description=each.description) for each in violations],
        retry_after=error.retry_after,
        metadata=error.metadata,
    )
    return {"error": detail.model_dump(exclude_defaults=True)}


def error_response(error: ServiceError, scope: Any) -> Response:
    """Returns the response to a request that fails with an error.

    Args:
        error: The error.
        scope: The ASGI scope of the request.
    """
    if error.retry_after is not None and is_event_source(scope):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return Response(waiting_event(error).encode(), media_type=_EVENTS, headers=headers)
    status = _status(error)
    # OpenAI's SDKs read this; they would otherwise retry twice after a permanent failure.
    headers = {"x-should-retry": "false" if error.retry_after is None else "true"}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(describe(error), status, headers)


def is_event_source(scope: Any) -> bool:
    """Returns whether a request is a GET that accepts server-sent events by name, as an EventSource sends it."""
    return (
        scope["type"] == "http"
        and scope["method"] == "GET"
        and any(name == b"accept" and _EVENTS.encode() in value for name, value in scope["headers"])
    )


def waiting_event(error: ServiceError) -> ServerSentEvent:
    """Returns the event with which an EventSource learns why it must wait, and for how long."""
    retry = max(math.ceil((error.retry_after or 0) * 1000), _MIN_RECONNECT_MILLISECONDS)
    return ServerSentEvent(json.dumps(describe(error), separators=(",", ":")), event="waiting", retry=retry, sep="\n")


def http_error(status: int, message: str, headers: Mapping[str, str]) -> JSONResponse:
    """Returns the response for an error of HTTP itself, which has no gRPC error; no retry helps."""
    name = _NAMES.get(status, "INVALID_ARGUMENT")
    detail = ErrorDetail(message=message, type=_type(status), param=None, code=name, status=name)
    body = {"error": detail.model_dump(exclude_defaults=True)}
    return JSONResponse(body, status, {**headers, "x-should-retry": "false"})


def handle_errors(application: FastAPI, observe: Observe = ignore) -> None:
    """Registers handlers that answer every error of an app in this format, and observe the rejected requests."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        if not isinstance(error, GenerationError):
            observe(CallRefused(error.reason))
        return error_response(error, request.scope)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        violations = []
        for each in error.errors():
            path = [str(part) for part in each["loc"][1:] if not isinstance(part, int)]
            violations.append(Violation(".".join(path) or str(each["loc"][0]), sentence(each)))
        observe(CallRefused(InvalidRequest.reason))
        return error_response(InvalidRequest(violations), request.scope)

    async def plain(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        if error.status_code == 405:
            # The exception knows only the methods of one route, but a path may have several.
            headers = {"allow": ", ".join(allowed_methods(request.app.routes, request.scope))}
        return http_error(error.status_code, f"{error.detail}.", headers)

    async def unexpected(request: Request, __: Exception) -> Response:
        return error_response(GenerationFailed("Internal error."), request.scope)

    application.add_exception_handler(ServiceError, known)
    application.add_exception_handler(RequestValidationError, invalid)
    application.add_exception_handler(HTTPException, plain)
    application.add_exception_handler(Exception, unexpected)


def _status(error: ServiceError) -> int:
    return _BY_REASON.get(error.reason) or _STATUSES.get(error.code, 500)


def _type(status: int) -> str:
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
