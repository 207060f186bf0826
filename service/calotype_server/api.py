"""What every transport offers: messages of the proto in, messages of the proto out, errors as `ServiceError`."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from calotype.v1 import calotype_pb2 as pb
from calotype_server import __version__, codec, errors
from calotype_server.stream import Update
from calotype_server.types import Failed, Succeeded
from calotype_server.validation import validate, validate_id, validate_page, validate_watch, watched_previews

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from calotype_server.errors import ServiceError, Violation
    from calotype_server.generation import Generation
    from calotype_server.generations import Generations
    from calotype_server.types import EncodedImage, Limits, PreviewOptions

__all__ = ["Api", "Following"]

_log = structlog.get_logger(__name__)

_LOADING_RETRY_SECONDS = 2.0


class Following:
    """A reader of one generation: iterate over its messages, up to the end, and close it.

    It counts as a reader from the beginning, not from the first message that is asked for: a caller who is gone before
    the answer has begun has left, too.

    Attributes:
        generation: What is read.
    """

    def __init__(self, generation: Generation, messages: AsyncGenerator[pb.Progress, None], first: pb.Progress) -> None:
        self.generation = generation
        self._messages = messages
        self._first: pb.Progress | None = first

    @property
    def failure(self) -> ServiceError | None:
        """Why the generation ended without its image, once it has."""
        end = self.generation.log.state.end
        return end.error if isinstance(end, Failed) else None

    def __aiter__(self) -> Following:
        return self

    async def __anext__(self) -> pb.Progress:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._messages)

    async def aclose(self) -> None:
        """Leaves. What that does to the generation is its caller's choice."""
        await self._messages.aclose()


class Api:
    """The use cases in terms of the proto. Every method raises `NotReady` until `open` is called.

    Args:
        limits: The operator's ceilings.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._opened: Generations | None = None

    def open(self, generations: Generations) -> None:
        """Begins to take requests, now that the model is loaded."""
        self._opened = generations

    async def generate(
        self,
        request: pb.GenerateRequest,
        caller: str,
        *,
        deadline: float | None = None,
        whole: bool = False,
        violations: Sequence[Violation] = (),
    ) -> Following:
        """Starts a generation, or finds the one that the same request has started, and follows it.

        Args:
            request: What to make.
            caller: Whose it is.
            deadline: Seconds that the caller waits at most; None for ever.
            whole: Whether the final image comes in one message, however large it is.
            violations: What was found wrong with the request when it was decoded.

        Raises:
            ServiceError: It is refused.
        """
        job, terms = validate(request, self.generations.model, self._limits, violations)
        generation = await self.generations.start(job, replace(terms, caller=caller, deadline=deadline))
        structlog.contextvars.bind_contextvars(generation=generation.id)
        _log.info("generation accepted", size=f"{job.width}x{job.height}", steps=job.step_count)
        return await self._follow(generation, whole=whole)

    async def watch(
        self, request: pb.WatchRequest, *, whole: bool = False, violations: Sequence[Violation] = ()
    ) -> Following:
        """Follows a generation that was started before; arguments as for `generate`.

        Raises:
            ServiceError: There is no such generation, or the request makes no sense.
        """
        validate_watch(request, self._limits, violations)
        generation = self.generations.find(request.generation_id)
        structlog.contextvars.bind_contextvars(generation=generation.id)
        preview = watched_previews(request, self._limits, generation.job)
        return await self._follow(generation, request.after_sequence, preview, whole=whole)

    def cancel(self, request: pb.CancelRequest) -> pb.CancelResponse:
        """Cancels by id.

        Raises:
            ServiceError: There is no such generation.
        """
        validate_id(request.generation_id)
        return pb.CancelResponse(phase=codec.encode_phase(self.generations.cancel(request.generation_id)))

    def finish(self, request: pb.FinishRequest) -> pb.FinishResponse:
        """Ends early by id.

        Raises:
            ServiceError: There is no such generation.
        """
        validate_id(request.generation_id)
        return pb.FinishResponse(phase=codec.encode_phase(self.generations.finish(request.generation_id)))

    def state(self, generation_id: str) -> pb.Progress:
        """Returns where a generation stands, without a picture.

        Raises:
            ServiceError: There is no such generation.
        """
        generation = self.generations.find(generation_id)
        update = Update(generation.log.state, None, generation.log.state.previews_skipped)
        (message,) = codec.encode_update(generation.id, generation.job.seed, update, None, whole=True)
        return message

    async def preview(self, generation_id: str, sequence: int) -> EncodedImage:
        """Returns the newest preview of a generation; when it has ended, its image.

        Raises:
            ServiceError: There is no such generation, no picture of it now, or message `sequence` is still to come.
        """
        generation = self.generations.find(generation_id)
        if sequence > generation.log.state.sequence:
            raise errors.ImageNotFound("There is no message of that number yet.", retry_after=1.0)
        image = await self.generations.newest_preview(generation)
        return image or self.image(generation_id)

    def image(self, generation_id: str) -> EncodedImage:
        """Returns the final image of a generation.

        Raises:
            ServiceError: There is no such generation, or it has none, or not yet.
        """
        state = self.generations.find(generation_id).log.state
        match state.end:
            case Succeeded(image):
                return image
            case Failed(error):
                raise errors.ImageNotFound(f"The generation has no image: {error.message}")
            case None:
                raise errors.ImageNotFound("There is no picture yet.", retry_after=state.estimated_remaining or 1.0)

    def list_generations(
        self, request: pb.ListGenerationsRequest, caller: str, violations: Sequence[Violation] = ()
    ) -> pb.ListGenerationsResponse:
        """Lists the caller's own.

        Raises:
            ServiceError: The request makes no sense.
        """
        size, before = validate_page(request, violations)
        return codec.encode_page(self.generations.newest(caller, before), size)

    def model(self) -> pb.Model:
        """Describes the model."""
        return codec.encode_model(self.generations.model, self._limits, __version__)

    async def _follow(
        self, generation: Generation, after: int = 0, preview: PreviewOptions | None = None, *, whole: bool
    ) -> Following:
        messages = self._messages(generation, after, preview, whole=whole)
        return Following(generation, messages, await anext(messages))

    async def _messages(
        self, generation: Generation, after: int, preview: PreviewOptions | None, *, whole: bool
    ) -> AsyncGenerator[pb.Progress, None]:
        async with contextlib.aclosing(self.generations.follow(generation, after, preview)) as updates:
            async for update, image in updates:
                for message in codec.encode_update(generation.id, generation.job.seed, update, image, whole=whole):
                    yield message

    @property
    def generations(self) -> Generations:
        """What it works on."""
        if self._opened is None:
            raise errors.NotReady("The model is still loading.", retry_after=_LOADING_RETRY_SECONDS)
        return self._opened
