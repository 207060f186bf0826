"""Converts gRPC statuses and the errors in messages to exceptions. `grpc.RpcError` never leaves this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from ._convert import optional_seconds
from ._errors import BY_CODE, CalotypeError, Cancelled, InvalidRequest, StreamIncomplete, Unavailable, UnknownError
from ._request import argument_name

if TYPE_CHECKING:
    import grpc

    from .v1 import calotype_pb2 as v1

__all__ = [
    "DETAILS_KEY",
    "from_error_message",
    "from_rpc_error",
    "from_status",
    "stalled",
    "stream_incomplete",
]

DETAILS_KEY = "grpc-status-details-bin"

_PLAIN_MESSAGES = {
    "Channel closed!": "The client was closed.",
    "Deadline Exceeded": "The timeout passed before the server finished.",
    "Locally cancelled by application!": "Cancelled by this client.",
}

_LOST = ("RST_STREAM", "CANCELLED")
"""Texts of the status CANCELLED for lost calls: a proxy resets a call whose server is gone, and gRPC cancels a call
that reaches a stopping server. A cancelled generation has details, and a cancel by this client another text."""

_UNHEALTHY = "backend unhealthy"
"""With several servers, gRPC watches their health, and fails calls itself while none of them is ready."""


def from_rpc_error(error: grpc.RpcError) -> CalotypeError:
    """Makes the exception for a call that ended with a status other than OK.

    Raise it `from None`, so that the traceback shows the caller's line and not this package's internals.
    """
    # grpc's annotations omit that the RpcError of a call is also the call.
    call: Any = error
    if not callable(getattr(call, "code", None)):
        return UnknownError(str(error))
    return from_status(call.code(), call.details(), call.trailing_metadata())


def from_status(code: grpc.StatusCode | None, text: str | None, metadata: Any) -> CalotypeError:
    """Makes the exception for a status code, its message and the trailing metadata."""
    kind = BY_CODE.get(code.value[0], UnknownError) if code is not None else UnknownError
    status = _details(metadata)
    if kind is Cancelled and not status.details and any(lost in (text or "") for lost in _LOST):
        kind, text = Unavailable, "The connection was lost."
    if kind is Unavailable and _UNHEALTHY in (text or ""):
        return Unavailable("No server is ready: they load their model or shut down.", reason="NOT_READY")
    text = next((words for phrase, words in _PLAIN_MESSAGES.items() if phrase in (text or "")), text or "")
    return _make(kind, text, status)


def from_error_message(error: v1.Error, default: type[CalotypeError]) -> CalotypeError:
    """Makes the exception for the error in the last message of a stream.

    Args:
        error: The error.
        default: The class of the exception when the code is OK or unknown.
    """
    kind = BY_CODE.get(error.code, default)
    return kind(error.message, reason=error.reason, retry_after=optional_seconds(error, "retry_delay"))


def stalled(seconds: float) -> Unavailable:
    """Makes the error for a server that has sent nothing for `seconds`."""
    return Unavailable(f"The server has sent nothing for {seconds:g} s.")


def stream_incomplete() -> StreamIncomplete:
    """Makes the error for a call that ended with OK before the end of its generation."""
    return StreamIncomplete("The stream ended before the end of the generation.", reason="STREAM_INCOMPLETE")


def _make(kind: type[CalotypeError], text: str, status: status_pb2.Status) -> CalotypeError:
    keywords: dict[str, Any] = {}
    for detail in status.details:
        if (info := _unpack(detail, error_details_pb2.ErrorInfo)) is not None:
            keywords |= {"reason": info.reason, "metadata": dict(info.metadata)}
        elif (retry := _unpack(detail, error_details_pb2.RetryInfo)) is not None:
            keywords["retry_after"] = optional_seconds(retry, "retry_delay")
        elif kind is InvalidRequest and (bad := _unpack(detail, error_details_pb2.BadRequest)) is not None:
            keywords["violations"] = [
                (argument_name(violation.field), violation.description) for violation in bad.field_violations
            ]
    return kind(status.message or text, **keywords)


def _unpack(detail: Any, kind: Any) -> Any:
    if not detail.Is(kind.DESCRIPTOR):
        return None
    message = kind()
    try:
        message.ParseFromString(detail.value)
    except DecodeError:
        return None
    return message


def _details(metadata: Any) -> status_pb2.Status:
    """Reads the rich status. When it is absent or damaged, returns an empty one, so that the plain status remains."""
    for key, value in metadata or ():
        if key == DETAILS_KEY:
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()
