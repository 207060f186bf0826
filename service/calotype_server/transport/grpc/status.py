"""Ends gRPC calls with the status of an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
from grpc_status import rpc_status

from calotype_server.api import encoding
from calotype_server.errors import GenerationFailed, ServiceError
from calotype_server.observability.events import CallRefused, Observe

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["abort", "to_status"]

_log = structlog.get_logger(__name__)


def to_status(error: ServiceError) -> grpc.Status:
    """Returns the gRPC status of an error, with its details."""
    status: grpc.Status = rpc_status.to_status(encoding.encode_error(error))
    return status


async def abort(context: Context, error: BaseException, observe: Observe) -> None:
    """Ends a call with the status of an error. An error that is not a `ServiceError` is logged and hidden.

    Raises:
        grpc.aio.AbortError: Always.
    """
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error)
        error = GenerationFailed("Internal error.")
    else:
        _log.info("call rejected", reason=error.reason)
    observe(CallRefused(error.reason))
    await context.abort_with_status(to_status(error))
