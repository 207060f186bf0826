"""Every status that the server sends has an `ErrorInfo`, because it comes from a `ServiceError`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from google.rpc.error_details_pb2 import ErrorInfo

from calotype_server import errors
from calotype_server.api.encoding import DOMAIN, encode_error
from calotype_server.errors import InvalidRequest, ServiceError, Violation

SERVER = Path(errors.__file__).parents[1]
FILES = [path for folder in ("transport", "api", "auth", "generations") for path in (SERVER / folder).rglob("*.py")]

NEVER_STATUSES = {
    "ClientGone": "the client disconnected, so it receives no status",
    "ClientDisconnected": "uvicorn's, for a WebSocket whose response is complete",
    "Stalled": "the client does not read, so it receives no status",
    "HttpParserError": "uvicorn answers it with an HTTP status",
    "HTTPException": "the HTTP API answers it with an HTTP status and the same JSON",
    "WebSocketDisconnect": "closes a WebSocket",
    "CancelledError": "stops a handler whose status is already decided",
    "StopAsyncIteration": "ends an iteration",
    "Damaged": "the store answers it with DataLoss",
    "FileDamaged": "the state is repaired at the start",
    "DatabaseError": "the store answers it with StateUnavailable",
    "UsageError": "as in grpc.aio, for mistakes of a servicer",
}
"""Exceptions that are not errors of the service, and why no gRPC status comes from them."""

HIDDEN = {"ValueError", "TypeError", "RuntimeError", "KeyError", "NotImplementedError", "AssertionError"}
"""Faults of the server itself: callers get INTERNAL with an `ErrorInfo`, without the text."""


def kinds(base: type[ServiceError] = ServiceError) -> list[type[ServiceError]]:
    """Returns all classes of errors in the package."""
    own = [each for each in base.__subclasses__() if each.__module__.startswith(errors.__name__)]
    return own + [kind for each in own for kind in kinds(each)]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_the_status_of_every_error_starts_with_an_error_info(kind: type[ServiceError]) -> None:
    """The first detail is an `ErrorInfo` with our domain, the reason of the class and its metadata."""
    if kind is InvalidRequest:
        error: ServiceError = InvalidRequest([Violation("prompt", "must not be empty")])
    else:
        error = kind("Why.", metadata={"limit": "1"})
    status, info = encode_error(error), ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason, dict(info.metadata)) == (DOMAIN, kind.reason, error.metadata)


def raised(path: Path) -> set[str]:
    """Returns the names of the classes that a file raises."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = kind.attr if isinstance(kind, ast.Attribute) else getattr(kind, "id", "")
            # Lower case: a variable or a function that returns an error.
            if name[:1].isupper():
                found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SERVER)))
def test_calls_fail_with_errors_of_the_service_only(path: Path) -> None:
    """Every class that is raised is an error with a reason, hidden, or never becomes a status."""
    others = raised(path) - set(errors.__all__) - set(NEVER_STATUSES) - HIDDEN
    assert others == set()


def statuses_without_error(path: Path) -> list[int]:
    """Returns the lines that set a status by its code instead of from an error."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    methods = [(node.func, node.lineno) for node in calls if isinstance(node.func, ast.Attribute)]
    return [
        line
        for function, line in methods
        if function.attr in ("abort", "set_code", "set_details")
        and isinstance(function.value, ast.Name)
        and function.value.id == "context"
    ]


def test_only_a_passed_on_status_is_set_by_its_code() -> None:
    """The bridge passes on statuses of its upstreams, and adds an `ErrorInfo` to those without details."""
    assert {path.name for path in FILES if statuses_without_error(path)} == {"forwarder.py"}
