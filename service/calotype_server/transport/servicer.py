"""Validate, generate, encode: the one servicer object behind every gRPC port."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import structlog
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer
from calotype_server import __version__, codec, errors
from calotype_server.types import Failed
from calotype_server.validation import validate

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc.aio

    from calotype_server.generations import Generations
    from calotype_server.types import Limits

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["GenerationServicer"]

_log = structlog.get_logger(__name__)

_LOADING_RETRY_SECONDS = 2.0


class GenerationServicer(GenerationServiceServicer):
    """`calotype.v1.GenerationService`. Answers UNAVAILABLE until `open` is called.

    Args:
        limits: The operator's ceilings.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._opened: Generations | None = None

    def open(self, generations: Generations) -> None:
        """Begins to take requests, now that the model is loaded."""
        self._opened = generations

    async def Generate(  # noqa: N802 - the name in the proto
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Streams one generation; see the proto."""
        generations = self._generations
        job = validate(request, generations.model, self._limits)
        generation = generations.start(job, _caller(context), context.time_remaining())
        structlog.contextvars.bind_contextvars(generation=generation.id)
        _log.info("generation accepted", size=f"{job.width}x{job.height}", steps=job.step_count)
        end = None
        async with contextlib.aclosing(generations.follow(generation)) as updates:
            async for update, image in updates:
                for message in codec.encode_update(generation.id, job.seed, update, image):
                    yield message
                end = update.state.end
        if isinstance(end, Failed):
            # Said in the last message already; repeated as the status for clients that look only there.
            await context.abort_with_status(rpc_status.to_status(codec.encode_error(end.error)))

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context
    ) -> pb.CancelResponse:
        """Cancels by id; see the proto."""
        if not request.generation_id:
            raise errors.InvalidRequest([errors.Violation("generation_id", "must not be empty")])
        return pb.CancelResponse(phase=codec.encode_phase(self._generations.cancel(request.generation_id)))

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.Model:
        """Describes the model; see the proto."""
        return codec.encode_model(self._generations.model, self._limits, __version__)

    @property
    def _generations(self) -> Generations:
        if self._opened is None:
            raise errors.NotReady("The model is still loading.", retry_after=_LOADING_RETRY_SECONDS)
        return self._opened


def _caller(context: Context) -> str:
    """Whose call it is: the peer's host. Every connection has a port of its own, and stands for the same caller."""
    return context.peer().rpartition(":")[0]
