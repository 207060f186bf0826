"""The service's methods for every transport: proto messages in, proto messages out, errors as `ServiceError`."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from calotype.v1 import calotype_pb2 as pb
from calotype_server import __version__, errors
from calotype_server.api import encoding
from calotype_server.api.enums import PHASES
from calotype_server.api.groups import validate_cancel
from calotype_server.api.progress_stream import ProgressStream
from calotype_server.api.sizes import narrowed
from calotype_server.api.validation import validate, validate_id, validate_page, validate_watch, watched_previews
from calotype_server.generations.event_log import Update
from calotype_server.observability.redaction import redact_in_logs
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from calotype_server.auth.access import Caller
    from calotype_server.errors import Violation
    from calotype_server.generations.lifecycle import Generations
    from calotype_server.limits import Limits
    from calotype_server.types import EncodedImage

__all__ = ["GenerationService"]

_log = structlog.get_logger(__name__)

_LOADING_SECONDS = 2.0


class GenerationService:
    """The methods of the service. Every method raises `NotReady` until `open` is called.

    Args:
        limits: The operator's limits for requests.
        loading_seconds: Estimates the seconds until `open` is called. Default: always 2.
    """

    def __init__(self, limits: Limits, loading_seconds: Callable[[], float] = lambda: _LOADING_SECONDS) -> None:
        self._limits = limits
        self._loading_seconds = loading_seconds
        self._generations: Generations | None = None

    def open(self, generations: Generations) -> None:
        """Accepts requests from now on, with images that fit into memory."""
        self._limits = narrowed(self._limits, generations.model)
        self._generations = generations

    @contextlib.asynccontextmanager
    async def generate(
        self,
        request: pb.GenerateRequest,
        caller: Caller,
        *,
        deadline: float | None = None,
        whole: bool = False,
        violations: Sequence[Violation] = (),
    ) -> AsyncIterator[ProgressStream]:
        """Starts a generation, or finds the one that the same request started earlier, and streams it in the block.

        Leaving the block disconnects the reader; the request's `on_disconnect` decides what happens to the generation.

        Args:
            request: The image to generate.
            caller: The caller that owns the generation.
            deadline: Seconds in which the caller needs the final image; None for no limit.
            whole: Whether the final image is sent in one message, regardless of its size.
            violations: Violations found when the request was decoded.

        Raises:
            ServiceError: The request is rejected.
        """
        opening = self.generate_all([request], caller, deadline=deadline, whole=whole, violations=violations)
        async with opening as (stream,):
            yield stream

    @contextlib.asynccontextmanager
    async def generate_all(
        self,
        requests: Sequence[pb.GenerateRequest],
        caller: Caller,
        *,
        deadline: float | None = None,
        whole: bool = False,
        violations: Sequence[Violation] = (),
    ) -> AsyncIterator[list[ProgressStream]]:
        """Starts a generation for each request, or none; the other arguments are those of `generate`.

        Args:
            requests: The images to generate, without a common request id.
            caller: The caller that owns the generations.
            deadline: Seconds in which the caller needs all final images; None for no limit.
            whole: Whether each final image is sent in one message.
            violations: Violations found when the requests were decoded.

        Raises:
            ServiceError: The requests are rejected. `InvalidRequest` has the field `image_count` if there are too many.
        """
        jobs = []
        for request in requests:
            redact_in_logs(request.prompt, request.negative_prompt)
            job, delivery = validate(request, self.generations.model, self._limits, violations)
            jobs.append((job, replace(delivery, caller=caller.id, deadline=deadline)))
        async with self.generations.start_all(jobs, caller.quota) as readers:
            streams = [ProgressStream(reader, whole=whole) for reader in readers]
            for stream in streams:
                job = stream.generation.job
                structlog.contextvars.bind_contextvars(generation=stream.generation.id)
                size = f"{job.width}x{job.height}"
                _log.info("generation accepted", size=size, steps=job.step_count, prompt=job.prompt)
                await stream.prefetch()
            yield streams

    @contextlib.asynccontextmanager
    async def watch(
        self, request: pb.WatchRequest, caller: Caller, *, whole: bool = False, violations: Sequence[Violation] = ()
    ) -> AsyncIterator[ProgressStream]:
        """Streams a generation that was started earlier; arguments as for `generate`.

        Raises:
            ServiceError: There is no such generation, or the request is invalid.
        """
        validate_watch(request, self._limits, violations)
        generation = self.generations.find(request.generation_id, caller)
        structlog.contextvars.bind_contextvars(generation=generation.id)
        preview = watched_previews(request, self._limits, generation.job)
        async with self.generations.follow(generation, request.after_sequence, preview) as reader:
            yield ProgressStream(reader, whole=whole)

    def cancel(
        self, request: pb.CancelRequest, caller: Caller, violations: Sequence[Violation] = ()
    ) -> pb.CancelResponse:
        """Cancels a generation by id, or a group.

        Raises:
            ServiceError: There is no such generation or group, or the request is invalid.
        """
        validate_cancel(request, violations)
        if request.group:
            return pb.CancelResponse(cancelled_count=self.generations.groups.cancel(request.group, caller))
        phase, cancelled = self.generations.cancel(request.generation_id, caller)
        return pb.CancelResponse(phase=PHASES.to_proto(phase), cancelled_count=int(cancelled))

    def finish(self, request: pb.FinishRequest, caller: Caller) -> pb.FinishResponse:
        """Finishes a generation early, by id.

        Raises:
            ServiceError: There is no such generation.
        """
        validate_id(request.generation_id)
        phase = self.generations.finish(request.generation_id, caller)
        return pb.FinishResponse(phase=PHASES.to_proto(phase))

    def state(self, generation_id: str, caller: Caller) -> pb.Progress:
        """Returns the state of a generation, without an image.

        Raises:
            ServiceError: There is no such generation.
        """
        generation = self.generations.find(generation_id, caller)
        update = Update(generation.events.state, None, generation.events.state.previews_skipped)
        (message,) = encoding.encode_update(generation.id, generation.job.seed, update, None, whole=True)
        return message

    async def preview(self, generation_id: str, sequence: int, caller: Caller) -> EncodedImage:
        """Returns the newest preview of a generation, or its image once it has ended.

        Raises:
            ServiceError: There is no such generation, it has no image now, or it has not reached message `sequence`.
        """
        generation = self.generations.find(generation_id, caller)
        if sequence > generation.events.state.sequence:
            raise errors.ImageNotFound("There is no message with this number yet.", retry_after=1.0)
        image = await self.generations.newest_preview(generation)
        return image or self.image(generation_id, caller)

    def image(self, generation_id: str, caller: Caller) -> EncodedImage:
        """Returns the final image of a generation.

        Raises:
            ServiceError: There is no such generation, or it has no image (yet).
        """
        state = self.generations.find(generation_id, caller).events.state
        match state.end:
            case Succeeded(image):
                return image
            case Failed(error):
                raise errors.ImageNotFound(f"The generation has no image: {error.message}")
            case None:
                raise errors.ImageNotFound("There is no image yet.", retry_after=state.estimated_remaining or 1.0)

    def list_generations(
        self, request: pb.ListGenerationsRequest, caller: Caller, violations: Sequence[Violation] = ()
    ) -> pb.ListGenerationsResponse:
        """Lists the generations that the caller may see.

        Raises:
            ServiceError: The request is invalid.
        """
        size, before = validate_page(request, violations)
        return encoding.encode_page(self.generations.newest(caller, before), size)

    def model(self) -> pb.Model:
        """Describes the model."""
        return encoding.encode_model(self.generations.model, self._limits, __version__, self.generations.replica)

    @property
    def generations(self) -> Generations:
        """All generations."""
        if self._generations is None:
            raise errors.NotReady("The model is still loading.", retry_after=self._loading_seconds())
        return self._generations
