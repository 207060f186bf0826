"""Observations: typed events that the stages of the server report to metrics and traces.

Any thread can report an observation. Observers must not block. Frequent observations contain no ids, prompts or
callers, so that metrics made from them have a bounded number of series.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import structlog

if TYPE_CHECKING:
    from calotype_server.types import Failed, Job, PreviewMethod, Succeeded

__all__ = [
    "AcceleratorActive",
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

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AcceleratorActive:
    """From now on, the denoiser is computed by this accelerator; "none" for plain calls."""

    name: str


@dataclass(frozen=True, slots=True)
class LeftQueue:
    """A generation left the queue after waiting `waited` seconds."""

    waited: float


@dataclass(frozen=True, slots=True)
class StepDone:
    """A denoising step of a generation ended, `seconds` after the previous one."""

    seconds: float


@dataclass(frozen=True, slots=True)
class BatchDone:
    """One call of the denoiser computed `rows` rows, of one or several generations, in `seconds`."""

    rows: int
    seconds: float


@dataclass(frozen=True, slots=True)
class PreviewRendered:
    """A preview was rendered; `seconds` is the time that the budget counts as lost for the denoiser."""

    method: PreviewMethod
    seconds: float


@dataclass(frozen=True, slots=True)
class PreviewPublished:
    """A preview became available to readers; `automatic` when the budget chose its method."""

    method: PreviewMethod
    automatic: bool


@dataclass(frozen=True, slots=True)
class FirstPreview:
    """A generation published its first preview, `seconds` after it was accepted."""

    seconds: float


@dataclass(frozen=True, slots=True)
class PreviewsDropped:
    """`count` previews were replaced by newer ones, before they were rendered or before a reader read them."""

    where: Literal["undrawn", "unread"]
    count: int


@dataclass(frozen=True, slots=True)
class PreviewFailed:
    """Rendering a preview raised an exception."""


@dataclass(frozen=True, slots=True)
class ImageEncoded:
    """An image was encoded as a file in `seconds`."""

    kind: Literal["preview", "final"]
    format: str
    seconds: float


@dataclass(frozen=True, slots=True)
class CancelCompleted:
    """A running generation was cancelled, and its thread ended `seconds` later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class PhaseSpan:
    """A phase of a generation. `begin` and `end` are in seconds of `time.monotonic`."""

    name: Literal["queue", "encode_prompt", "denoise", "decode", "encode_image"]
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class GenerationEnded:
    """A generation ended.

    Attributes:
        generation_id: Id of the generation.
        job: Its job.
        end: Its last event.
        phases: The phases that it reached, in order. A failed generation failed in the last of them.
        steps: Completed denoising steps.
        batch_rows: Mean number of rows in the batches that contained it; 0 when unknown.
    """

    generation_id: str
    job: Job
    end: Succeeded | Failed
    phases: tuple[PhaseSpan, ...]
    steps: int
    batch_rows: float


@dataclass(frozen=True, slots=True)
class MessageSent:
    """A transport sent a message of `size` bytes."""

    transport: str
    size: int


@dataclass(frozen=True, slots=True)
class CallRefused:
    """A call was rejected with a `ServiceError`, whose reason is `reason`."""

    reason: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """A call ended; `method` is its short name or "other", `code` its gRPC status name or HTTP status."""

    transport: str
    method: str
    code: str


Observation = (
    AcceleratorActive
    | LeftQueue
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
"""Every kind of observation."""

Observe = Callable[[Observation], None]
"""A function that receives observations."""


def ignore(observation: Observation) -> None:
    """Discards an observation."""


def to_all(*observers: Observe) -> Observe:
    """Returns an observer that passes each observation to all of `observers`.

    It never raises: measuring must not change what is measured. The first exception of each observer for each kind of
    observation is logged.
    """
    failed: set[tuple[int, type[Observation]]] = set()

    def observe(observation: Observation) -> None:
        for number, observer in enumerate(observers):
            try:
                observer(observation)
            except BaseException:
                kind = type(observation)
                if (number, kind) not in failed:
                    failed.add((number, kind))
                    _log.exception("an observer failed", observation=kind.__name__)

    return observe
