"""Validate, generate, encode: the one servicer object behind every gRPC port."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import structlog
from grpc_status import rpc_status

from calotype.v1 import calotype_pb2 as pb
from calotype.v1.calotype_pb2_grpc import GenerationServiceServicer
from calotype_server import __version__, codec, errors
from calotype_server.transport.credentials import from_metadata
from calotype_server.types import Failed
from calotype_server.validation import validate, validate_id, validate_page, validate_watch, watched_previews
from calotype_server.withholding import bind_texts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import grpc.aio

    from calotype_server.access import Access, Caller
    from calotype_server.generation import Generation
    from calotype_server.generations import Generations
    from calotype_server.types import Limits, PreviewOptions

    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["GenerationServicer"]

_log = structlog.get_logger(__name__)

_LOADING_RETRY_SECONDS = 2.0


class GenerationServicer(GenerationServiceServicer):
    """`calotype.v1.GenerationService`. Answers UNAVAILABLE until `open` is called.

    Args:
        limits: The operator's ceilings.
        access: Who may call.
    """

    def __init__(self, limits: Limits, access: Access) -> None:
        self._limits = limits
        self._access = access
        self._opened: Generations | None = None

    def open(self, generations: Generations) -> None:
        """Begins to take requests, now that the model is loaded."""
        self._opened = generations

    async def Generate(  # noqa: N802 - the name in the proto
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Starts a generation and streams it; see the proto."""
        caller = self._caller(context)
        bind_texts(request.prompt, request.negative_prompt)
        job, terms = validate(request, self._generations.model, self._limits)
        terms = replace(terms, caller=caller.id, deadline=context.time_remaining())
        generation = await self._generations.start(job, terms, caller.quota)
        structlog.contextvars.bind_contextvars(generation=generation.id)
        _log.info("generation accepted", size=f"{job.width}x{job.height}", steps=job.step_count, prompt=job.prompt)
        async with contextlib.aclosing(self._follow(generation, context)) as messages:
            async for message in messages:
                yield message

    async def Watch(  # noqa: N802
        self, request: pb.WatchRequest, context: Context
    ) -> AsyncGenerator[pb.Progress, None]:
        """Streams a generation that was started before; see the proto."""
        validate_watch(request, self._limits)
        generation = self._generations.find(request.generation_id, self._caller(context))
        structlog.contextvars.bind_contextvars(generation=generation.id)
        preview = watched_previews(request, self._limits, generation.job)
        following = self._follow(generation, context, request.after_sequence, preview)
        async with contextlib.aclosing(following) as messages:
            async for message in messages:
                yield message

    async def Cancel(  # noqa: N802
        self, request: pb.CancelRequest, context: Context
    ) -> pb.CancelResponse:
        """Cancels by id; see the proto."""
        validate_id(request.generation_id)
        phase = self._generations.cancel(request.generation_id, self._caller(context))
        return pb.CancelResponse(phase=codec.encode_phase(phase))

    async def Finish(  # noqa: N802
        self, request: pb.FinishRequest, context: Context
    ) -> pb.FinishResponse:
        """Ends early by id; see the proto."""
        validate_id(request.generation_id)
        phase = self._generations.finish(request.generation_id, self._caller(context))
        return pb.FinishResponse(phase=codec.encode_phase(phase))

    async def ListGenerations(  # noqa: N802
        self, request: pb.ListGenerationsRequest, context: Context
    ) -> pb.ListGenerationsResponse:
        """Lists what the caller may see; see the proto."""
        size, before = validate_page(request)
        return codec.encode_page(self._generations.newest(self._caller(context), before), size)

    async def GetModel(  # noqa: N802
        self, request: pb.GetModelRequest, context: Context
    ) -> pb.Model:
        """Describes the model; see the proto."""
        return codec.encode_model(self._generations.model, self._limits, __version__, self._generations.replica)

    async def _follow(
        self, generation: Generation, context: Context, after: int = 0, preview: PreviewOptions | None = None
    ) -> AsyncGenerator[pb.Progress, None]:
        """Yields the messages of a generation, and repeats an error at the end as the status of the call."""
        end = None
        async with contextlib.aclosing(self._generations.follow(generation, after, preview)) as updates:
            async for update, image in updates:
                for message in codec.encode_update(generation.id, generation.job.seed, update, image):
                    yield message
                end = update.state.end
        if isinstance(end, Failed):
            # Said in the last message already; repeated for clients that look only at the status.
            await context.abort_with_status(rpc_status.to_status(codec.encode_error(end.error)))

    def _caller(self, context: Context) -> Caller:
        caller = self._access.admit(from_metadata(context.invocation_metadata()), context.peer())
        structlog.contextvars.bind_contextvars(caller=caller.id)
        return caller

    @property
    def _generations(self) -> Generations:
        if self._opened is None:
            raise errors.NotReady("The model is still loading.", retry_after=_LOADING_RETRY_SECONDS)
        return self._opened
