"""An image to generate, and how to deliver it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from calotype_server.types.images import ImageFormat  # noqa: TC001 - pydantic evaluates the annotations of `Job`
from calotype_server.types.loras import Lora  # noqa: TC001 - as above
from calotype_server.types.previews import PreviewOptions
from calotype_server.types.prompts import PromptSyntax
from calotype_server.types.schedulers import Sigmas, TimestepSpacing  # noqa: TC001 - as above
from calotype_server.types.speed import Speed, computed_steps

__all__ = [
    "DeliveryOptions",
    "DisconnectPolicy",
    "Job",
    "OutputOptions",
    "Priority",
]


class Priority(IntEnum):
    """Rank in the queue: smaller numbers start first."""

    INTERACTIVE = 1
    BATCH = 2


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """File format of the final image.

    Attributes:
        format: File format.
        quality: 1 to 95 for JPEG, 1 to 100 for WebP; ignored for PNG.
        metadata: Whether the file contains the parameters of the generation.
        size: Width and height of the image in pixels, if they are not those that the model draws.
    """

    format: ImageFormat = "png"
    quality: int = 90
    metadata: bool = True
    size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request. Only validation creates jobs, and only jobs enter the queue.

    Attributes:
        prompt: Text to draw; not empty.
        negative_prompt: Text to avoid, or None when absent or when the model does not support it.
        width: Pixels that the model draws, a multiple of `ModelInfo.size_multiple`. The image may have another size;
            see `output_size`.
        height: Pixels that the model draws, a multiple of `ModelInfo.size_multiple`.
        step_count: Denoising steps, at least 1.
        guidance_scale: Classifier-free guidance, 0 to 100, or None when the model does not support it.
        seed: Seed of the initial noise, 0 to 2**53 - 1.
        scheduler: One of `ModelInfo.schedulers`, or an alias of `ModelInfo.scheduler_details` in its main spelling.
        preview: Options of the previews.
        output: Options of the final image.
        priority: Rank in the queue.
        speed: Which denoising steps are computed.
        loras: LoRAs to apply, each at most once.
        prompt_syntax: How the prompts are read.
        sigmas: Noise levels of the steps, or None for those of the scheduler.
        spacing: Spacing of the timesteps, or None for that of the scheduler.
    """

    prompt: str
    negative_prompt: str | None
    width: int
    height: int
    step_count: int
    guidance_scale: float | None
    seed: int
    scheduler: str
    preview: PreviewOptions = field(default_factory=PreviewOptions)
    output: OutputOptions = OutputOptions()
    priority: Priority = Priority.INTERACTIVE
    speed: Speed = Speed.EXACT
    loras: tuple[Lora, ...] = ()
    prompt_syntax: PromptSyntax = PromptSyntax.PLAIN
    sigmas: Sigmas | None = None
    spacing: TimestepSpacing | None = None

    @property
    def pixel_count(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def output_size(self) -> tuple[int, int]:
        """Width and height of the final image, in pixels."""
        return self.output.size or (self.width, self.height)

    @property
    def computed_step_count(self) -> int:
        """Denoising steps that the device computes; the other ones are forecast."""
        return self.computed_steps(self.step_count, self.step_count)

    def computed_steps(self, done: int, total: int) -> int:
        """Returns how many of the first `done` of `total` steps the device computes."""
        return computed_steps(done, total) if self.speed is Speed.FAST else done


class DisconnectPolicy(IntEnum):
    """What happens to a generation when its last reader disconnects before the end."""

    CANCEL = 1
    KEEP = 2


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """Everything in a request that does not affect the image.

    Attributes:
        caller: Id of the owner, see `auth.access.Caller.id`. Callers share the server evenly.
        deadline: Maximum seconds until the final image; None for no deadline.
        on_disconnect: What happens when the last reader disconnects.
        grace: Seconds, 0 to 3600, between the last disconnect and the cancel. A reader that returns stops the timer.
        request_id: The caller's own id of the request, or "". The same id never starts two generations.
        seed_was_drawn: Whether the server chose the seed.
        group: The caller's own id of a group of generations that can be cancelled together, or "".
    """

    caller: str = ""
    deadline: float | None = None
    on_disconnect: DisconnectPolicy = DisconnectPolicy.CANCEL
    grace: float = 0.0
    request_id: str = ""
    seed_was_drawn: bool = False
    group: str = ""
