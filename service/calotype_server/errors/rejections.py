"""Errors with which the server rejects a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.errors.base import ServiceError, Violation

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "CompressionUnsupported",
    "ConcurrentGenerations",
    "DeadlineExceeded",
    "DeadlineTooShort",
    "GenerationNotFound",
    "GroupCancelled",
    "GroupNotFound",
    "ImageNotFound",
    "InvalidRequest",
    "KeyExpired",
    "KeyInvalid",
    "KeyRequired",
    "MethodNotFound",
    "NotReady",
    "OtherReplica",
    "PixelStepsPerMinute",
    "PreviewMethodUnavailable",
    "QueueFull",
    "RateLimited",
    "RequestIdTaken",
    "RequestStreamUnsupported",
    "RequestTooLarge",
    "RequestTooLate",
    "RequestUnreadable",
    "RequestsPerMinute",
    "RoleRequired",
    "ServiceNotFound",
    "StateUnavailable",
    "TooManyCalls",
    "TooManyStreams",
    "Unauthenticated",
    "UpstreamUnavailable",
    "WrongRequestCount",
]


class InvalidRequest(ServiceError):
    """The request is malformed or asks for something outside the limits. Lists every violation at once."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_REQUEST"

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = tuple(violations)


class NotReady(ServiceError):
    """The server is loading its model."""

    code = "UNAVAILABLE"
    reason = "NOT_READY"


class UpstreamUnavailable(ServiceError):
    """The bridge cannot reach any server behind it."""

    code = "UNAVAILABLE"
    reason = "UPSTREAM_UNAVAILABLE"


class StateUnavailable(ServiceError):
    """The server cannot read or write its state folder at the moment. The log has the cause."""

    code = "UNAVAILABLE"
    reason = "STATE_UNAVAILABLE"


class Unauthenticated(ServiceError):
    """Base of the errors of callers that the server cannot identify."""

    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class KeyRequired(Unauthenticated):
    """The server requires an API key and the call has none."""

    reason = "KEY_REQUIRED"


class KeyInvalid(Unauthenticated):
    """The call has an API key that the server does not know. The message does not say which part is wrong."""

    reason = "KEY_INVALID"


class KeyExpired(Unauthenticated):
    """The API key is correct but has expired."""

    reason = "KEY_EXPIRED"


class RoleRequired(ServiceError):
    """The key is valid but lacks the role that the method requires."""

    code = "PERMISSION_DENIED"
    reason = "ROLE_REQUIRED"


class QueueFull(ServiceError):
    """The queue, or the caller's share of it, is full."""

    code = "RESOURCE_EXHAUSTED"
    reason = "QUEUE_FULL"


class TooManyCalls(ServiceError):
    """The caller's host already has the maximum number of open calls."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_CALLS"


class MethodNotFound(ServiceError):
    """The port offers no method of this name."""

    code = "UNIMPLEMENTED"
    reason = "METHOD_NOT_FOUND"


class ServiceNotFound(ServiceError):
    """A health check names a service that the server does not have."""

    code = "NOT_FOUND"
    reason = "SERVICE_NOT_FOUND"


class RequestStreamUnsupported(ServiceError):
    """The method receives a stream of requests, which grpc-web cannot send."""

    code = "UNIMPLEMENTED"
    reason = "REQUEST_STREAM_UNSUPPORTED"


class WrongRequestCount(ServiceError):
    """The method takes exactly one request, and the client sent none or several."""

    code = "UNIMPLEMENTED"
    reason = "WRONG_REQUEST_COUNT"


class CompressionUnsupported(ServiceError):
    """The request is compressed in a way that the port does not support."""

    code = "UNIMPLEMENTED"
    reason = "COMPRESSION_UNSUPPORTED"


class RequestUnreadable(ServiceError):
    """The bytes of the request are not a message of the method's type, or not a message at all."""

    reason = "REQUEST_UNREADABLE"


class DeadlineExceeded(ServiceError):
    """The deadline of the call passed. Native clients notice it themselves."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class RequestTooLate(ServiceError):
    """The client opened a call but did not send its request in time."""

    code = "DEADLINE_EXCEEDED"
    reason = "REQUEST_TOO_LATE"


class RateLimited(ServiceError):
    """Base of the errors of callers that exceed a limit of their key. The reason names the limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RATE_LIMITED"


class RequestsPerMinute(RateLimited):
    """The key started too many generations in the last minute."""

    reason = "REQUESTS_PER_MINUTE"


class PixelStepsPerMinute(RateLimited):
    """The key's generations of the last minute used too many pixel steps (width times height times steps)."""

    reason = "PIXEL_STEPS_PER_MINUTE"


class ConcurrentGenerations(RateLimited):
    """The key already has the maximum number of queued and running generations."""

    reason = "CONCURRENT_GENERATIONS"


class DeadlineTooShort(ServiceError):
    """The server rejects the request at once because the call's deadline would pass before the image is finished."""

    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_TOO_SHORT"


class GenerationNotFound(ServiceError):
    """No generation with this id exists, or it belongs to another caller."""

    code = "NOT_FOUND"
    reason = "GENERATION_NOT_FOUND"


class OtherReplica(GenerationNotFound):
    """The generation belongs to another server, which may be gone."""

    reason = "OTHER_REPLICA"


class GroupNotFound(ServiceError):
    """The caller has no generation in this group, or none is retained any more."""

    code = "NOT_FOUND"
    reason = "GROUP_NOT_FOUND"


class GroupCancelled(ServiceError):
    """The group of a new generation was cancelled a short time ago."""

    code = "CANCELLED"
    reason = "GROUP_CANCELLED"


class ImageNotFound(ServiceError):
    """The generation exists, but the requested image does not exist yet, was discarded, or was never made."""

    code = "NOT_FOUND"
    reason = "IMAGE_NOT_FOUND"


class RequestIdTaken(ServiceError):
    """The caller already used this request id with different parameters."""

    code = "ALREADY_EXISTS"
    reason = "REQUEST_ID_TAKEN"


class RequestTooLarge(ServiceError):
    """The HTTP request body is larger than the limit."""

    code = "RESOURCE_EXHAUSTED"
    reason = "REQUEST_TOO_LARGE"


class TooManyStreams(ServiceError):
    """The WebSocket already carries the maximum number of generations."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_MANY_STREAMS"


class PreviewMethodUnavailable(ServiceError):
    """The server does not have the requested preview method, or the operator does not allow it."""

    code = "FAILED_PRECONDITION"
    reason = "PREVIEW_METHOD_UNAVAILABLE"
