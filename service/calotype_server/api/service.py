"""What every transport offers: messages of the proto in, messages of the proto out, errors as `ServiceError`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from calotype.v1 import calotype_pb2 as pb
from calotype_server import __version__, errors
from calotype_server.api import encoding
from calotype_server.api.enums import PHASES
from calotype_server.api.validation import validate, validate_id, validate_page, validate_watch, watched_previews
from calotype_server.generations.event_log import Update
from calotype_server.observability.redaction import redact_in_logs
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from calotype_server.auth.access import Caller
    from calotype_server.errors import ServiceError, Violation
    from calotype_server.generations.generation import Generation
    from calotype_server.generations.lifecycle import Generations
    from calotype_server.generations.tracked_reader import Reader
    from calotype_server.limits import Limits
    from calotype_server.types import EncodedImage

__all__ = ["Api", "Following"]

_log = structlog.get_logger(__name__)

_LOADING_RETRY_SECONDS = 2.0


class Following:
    """A reader of one generation: iterate over its messages, up to the end, and close it.

    Args:
        generation: What is read.
        updates: What there is to tell of it.
        whole: Whether the final image comes in one message, however large it is.

    Attributes:
        generation: What is read.
    """

    def __init__(
        self, generation: Generation, updates: Reader[tuple[Update, EncodedImage | None]], *, whole: bool
    ) -> None:
        self.generation = generation
        self._updates = updates
        self._messages = self._encoded(whole)
        self._first: pb.Progress | None = None

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

    async def read_ahead(self) -> None:
        """Reads the first message now, so that it tells of the beginning however late it is asked for.

        Raises:
            StateUnavailable: The generation cannot be kept, and is given up.
        """
        self._first = await anext(self._messages)

    async def aclose(self) -> None:
        """Leaves. What that does to the generation is its caller's choice."""
        await self._messages.aclose()
        await self._updates.aclose()

    async def _encoded(self, whole: bool) -> AsyncGenerator[pb.Progress, None]:
        seed = self.generation.job.seed
        async for update, image in self._updates:
            for message in encoding.encode_update(self.generation.id, seed, update, image, whole=whole):
                yield message


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
        caller: Caller,
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
        redact_in_logs(request.prompt, request.negative_prompt)
        job, terms = validate(request, self.generations.model, self._limits, violations)
        terms = replace(terms, caller=caller.id, deadline=deadline)
        generation = await self.generations.start(job, terms, caller.quota)
        structlog.contextvars.bind_contextvars(generation=generation.id)
        _log.info("generation accepted", size=f"{job.width}x{job.height}", steps=job.step_count, prompt=job.prompt)
        following = Following(generation, self.generations.follow(generation), whole=whole)
        await following.read_ahead()
        return following

    def watch(
        self, request: pb.WatchRequest, caller: Caller, *, whole: bool = False, violations: Sequence[Violation] = ()
    ) -> Following:
        """Follows a generation that was started before; arguments as for `generate`.

        Raises:
            ServiceError: There is no such generation, or the request makes no sense.
        """
        validate_watch(request, self._limits, violations)
        generation = self.generations.find(request.generation_id, caller)
        structlog.contextvars.bind_contextvars(generation=generation.id)
        preview = watched_previews(request, self._limits, generation.job)
        updates = self.generations.follow(generation, request.after_sequence, preview)
        return Following(generation, updates, whole=whole)

    def cancel(self, request: pb.CancelRequest, caller: Caller) -> pb.CancelResponse:
        """Cancels by id.

        Raises:
            ServiceError: There is no such generation.
        """
        validate_id(request.generation_id)
        phase = self.generations.cancel(request.generation_id, caller)
        return pb.CancelResponse(phase=PHASES.to_proto(phase))

    def finish(self, request: pb.FinishRequest, caller: Caller) -> pb.FinishResponse:
        """Ends early by id.

        Raises:
            ServiceError: There is no such generation.
        """
        validate_id(request.generation_id)
        phase = self.generations.finish(request.generation_id, caller)
        return pb.FinishResponse(phase=PHASES.to_proto(phase))

    def state(self, generation_id: str, caller: Caller) -> pb.Progress:
        """Returns where a generation stands, without a picture.

        Raises:
            ServiceError: There is no such generation.
        """
        generation = self.generations.find(generation_id, caller)
        update = Update(generation.log.state, None, generation.log.state.previews_skipped)
        (message,) = encoding.encode_update(generation.id, generation.job.seed, update, None, whole=True)
        return message

    async def preview(self, generation_id: str, sequence: int, caller: Caller) -> EncodedImage:
        """Returns the newest preview of a generation; when it has ended, its image.

        Raises:
            ServiceError: There is no such generation, no picture of it now, or message `sequence` is still to come.
        """
        generation = self.generations.find(generation_id, caller)
        if sequence > generation.log.state.sequence:
            raise errors.ImageNotFound("There is no message of that number yet.", retry_after=1.0)
        image = await self.generations.newest_preview(generation)
        return image or self.image(generation_id, caller)

    def image(self, generation_id: str, caller: Caller) -> EncodedImage:
        """Returns the final image of a generation.

        Raises:
            ServiceError: There is no such generation, or it has none, or not yet.
        """
        state = self.generations.find(generation_id, caller).log.state
        match state.end:
            case Succeeded(image):
                return image
            case Failed(error):
                raise errors.ImageNotFound(f"The generation has no image: {error.message}")
            case None:
                raise errors.ImageNotFound("There is no picture yet.", retry_after=state.estimated_remaining or 1.0)

    def list_generations(
        self, request: pb.ListGenerationsRequest, caller: Caller, violations: Sequence[Violation] = ()
    ) -> pb.ListGenerationsResponse:
        """Lists what the caller may see.

        Raises:
            ServiceError: The request makes no sense.
        """
        size, before = validate_page(request, violations)
        return encoding.encode_page(self.generations.newest(caller, before), size)

    def model(self) -> pb.Model:
        """Describes the model."""
        return encoding.encode_model(self.generations.model, self._limits, __version__, self.generations.replica)

    @property
    def generations(self) -> Generations:
        """What it works on."""
        if self._opened is None:
            raise errors.NotReady("The model is still loading.", retry_after=_LOADING_RETRY_SECONDS)
        return self._opened
