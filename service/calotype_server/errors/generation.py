"""Errors that end one generation without an image."""

from __future__ import annotations

from calotype_server.errors.base import ServiceError

__all__ = [
    "Abandoned",
    "Cancelled",
    "ContentWithheld",
    "DataLoss",
    "Draining",
    "EngineCrashed",
    "EngineDead",
    "EngineStalled",
    "GenerationError",
    "GenerationFailed",
    "NumericalFailure",
    "OutOfMemory",
]


class GenerationError(ServiceError):
    """Base of the errors that end one generation without an image."""


class Cancelled(GenerationError):
    """The caller cancelled the generation."""

    code = "CANCELLED"
    reason = "CANCELLED"


class Abandoned(Cancelled):
    """The last reader disconnected and did not return in time. A retry of the same request starts a new generation."""

    reason = "ABANDONED"


class Draining(GenerationError):
    """The server shuts down: it ended the generation before it finished, or accepts no new ones."""

    code = "UNAVAILABLE"
    reason = "DRAINING"


class OutOfMemory(GenerationError):
    """The device, or the host, ran out of memory."""

    code = "RESOURCE_EXHAUSTED"
    reason = "OUT_OF_MEMORY"


class ContentWithheld(GenerationError):
    """The model's safety checker rejected the image."""

    code = "FAILED_PRECONDITION"
    reason = "CONTENT_WITHHELD"


class NumericalFailure(GenerationError):
    """The model produced NaN or infinity."""

    reason = "NUMERICAL_FAILURE"


class GenerationFailed(GenerationError):
    """The pipeline raised an unexpected exception. The log has it."""

    reason = "GENERATION_FAILED"


class EngineDead(GenerationError):
    """The device is in a state that only a new process can fix."""

    reason = "ENGINE_DEAD"


class EngineStalled(GenerationError):
    """The generation made no progress for so long that the process exits. The log has the stack of every thread."""

    reason = "ENGINE_STALLED"


class EngineCrashed(GenerationError):
    """The generation ended the server's process on every attempt, so the server does not try it again."""

    reason = "ENGINE_CRASHED"


class DataLoss(GenerationError):
    """The stored generation is damaged. A retry with a new request id makes the image again."""

    code = "DATA_LOSS"
    reason = "DATA_LOSS"
