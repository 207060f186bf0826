"""What there is to see of a server at work; whoever measures or traces takes these. Standard library only.

Observations carry no ids, prompts or callers where they come often: what is counted must be bounded. They are made by
any thread, and whoever takes them must neither block nor raise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from calotype_server.types import Failed, Job, PreviewMethod, Succeeded

__all__ = [
    "BatchDone",
    "CallEnded",
    "CallRefused",
    "CancelCompleted",
    "FirstPreview",
    "GenerationEnded",
    "ImageEncoded",
    "LeftQueue",
    "MessageSent",
    "Observation",
    "Observe",
    "PhaseSpan",
    "PreviewFailed",
    "PreviewPublished",
    "PreviewRendered",
    "PreviewsDropped",
    "StepDone",
    "ignore",
    "to_all",
]


@dataclass(frozen=True, slots=True)
class LeftQueue:
    """A generation left the queue after `waited` seconds."""

    waited: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """A generation's denoising step ended `seconds` after the one before it."""

    seconds: float


@dataclass(frozen=True, slots=True)
class BatchDone:
    """The denoiser computed `rows` rows, of one or several generations, in one call."""

    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PreviewRendered:
    """A decoder made a picture; `seconds` is what the denoiser may have lost, as the budget reckons."""

    method: PreviewMethod
    seconds: float


@dataclass(frozen=True, slots=True)
class PreviewPublished:
    """A preview is there for readers; `automatic` when the budget chose the method."""

    method: PreviewMethod
    automatic: bool


@dataclass(frozen=True, slots=True)
class FirstPreview:
    """The first preview of a generation came `seconds` after it was accepted."""

    seconds: float


@dataclass(frozen=True, slots=True)
class PreviewsDropped:
    """Previews were replaced by newer ones: before they were drawn, or in a slow reader's slot."""

    where: Literal["undrawn", "unread"]
    count: int


@dataclass(frozen=True, slots=True)
class PreviewFailed:
    """A decoder raised."""


@dataclass(frozen=True, slots=True)
class ImageEncoded:
    """An image file was written."""

    kind: Literal["preview", "final"]
    format: str
    seconds: float


@dataclass(frozen=True, slots=True)
class CancelCompleted:
    """A generation at work was told to end, and its thread had ended `seconds` later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A phase of a generation, on the clock of `time.monotonic`, in seconds."""

    name: Literal["queue", "encode_prompt", "denoise", "decode", "encode_image"]
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """A generation is over.

    Attributes:
        generation_id: Its id.
        job: What it was to make.
        end: What came of it.
        phases: Those it was in, in their order; when it failed, in the last of them.
        steps: Denoising steps done.
        batch_rows: Rows computed together with its own on average, its own included; 0 when unknown.
    """

    generation_id: str
    job: Job
    end: Succeeded | Failed
    phases: tuple[PhaseSpan, ...]
    steps: int
    batch_rows: float


@dataclass(frozen=True, slots=True)
class MessageSent:
    """A message of `size` bytes was handed to a transport."""

    transport: str
    size: int


@dataclass(frozen=True, slots=True)
class CallRefused:
    """A call was answered with an error of ours before or instead of a generation."""

    reason: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call is over; `method` is its short name or "other", `code` the name of its gRPC status."""

    transport: str
    method: str
    code: str


Observation = (
    LeftQueue
    | StepDone
    | BatchDone
    | PreviewRendered
    | PreviewPublished
    | FirstPreview
    | PreviewsDropped
    | PreviewFailed
    | ImageEncoded
    | CancelCompleted
    | GenerationEnded
    | MessageSent
    | CallRefused
    | CallEnded
)
"""Everything that can be seen."""

Observe = Callable[[Observation], None]
"""Takes what there is to see."""


def ignore(observation: Observation) -> None:
    """Takes no notice."""


def to_all(*observers: Observe) -> Observe:
    """Returns what tells each of several."""

    def observe(observation: Observation) -> None:
        for observer in observers:
            observer(observation)

    return observe
