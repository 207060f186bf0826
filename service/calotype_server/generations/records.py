"""The stored record of a generation, and its JSON.

Unknown fields are ignored and missing ones take their defaults, so that versions which differ in fields can read each
other's records.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from calotype_server import errors
from calotype_server.types import DeliveryOptions, ImageFormat, Job, Notice, Phase, Timings

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["End", "ImageFacts", "Record", "dump_end", "dump_record", "parse_end", "parse_record"]


def _revive(document: Any) -> errors.ServiceError:
    """Returns the stored error. An unknown reason becomes `GenerationFailed`."""
    match document:
        case {"reason": errors.InvalidRequest.reason, "violations": [*violations]}:
            return errors.InvalidRequest([errors.Violation(field, text) for field, text in violations])
        case {"reason": str(reason), "message": str(message)}:
            kind = _KINDS.get(reason, errors.GenerationFailed)
            return kind(message, retry_after=document.get("retry_after"), metadata=document.get("metadata"))
    raise ValueError("not an error")


def _describe(error: errors.ServiceError) -> dict[str, Any]:
    return {
        "code": error.code,
        "reason": error.reason,
        "message": error.message,
        "retry_after": error.retry_after,
        "metadata": error.metadata,
        "violations": [(each.field, each.description) for each in getattr(error, "violations", ())],
    }


def _kinds(base: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


_KINDS = {kind.reason: kind for kind in _kinds(errors.ServiceError) if kind is not errors.InvalidRequest}


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Properties of a final image that can be read without it. `width` and `height` in pixels, `size` in bytes."""

    format: ImageFormat
    width: int
    height: int
    size: int


@dataclass(frozen=True, slots=True)
class End:
    """How a generation ended.

    Attributes:
        at: Time of the end, in Unix seconds.
        step: Number of completed denoising steps.
        total_steps: Number of denoising steps in all; 0 if it never became known.
        timings: Durations of the phases.
        finished_early: Whether the image is the prediction after `step`.
        image: Properties of the final image; None if there is an error.
        error: Why there is no image; None if there is one.
        notices: Warnings for the caller.
    """

    at: float
    step: int
    total_steps: int
    timings: Timings
    finished_early: bool = False
    image: ImageFacts | None = None
    error: Annotated[errors.ServiceError, PlainValidator(_revive), PlainSerializer(_describe)] | None = None
    notices: tuple[Notice, ...] = ()

    @property
    def phase(self) -> Phase:
        """SUCCEEDED, CANCELLED or FAILED."""
        if self.error is None:
            return Phase.SUCCEEDED
        return Phase.CANCELLED if isinstance(self.error, errors.Cancelled) else Phase.FAILED


@dataclass(frozen=True, slots=True)
class Record:
    """An accepted generation.

    Attributes:
        generation_id: The generation's id.
        job: The image to generate, with its seed.
        delivery: How the caller wants it delivered, and who the caller is.
        created: Time of acceptance, in Unix seconds.
        attempts: How often the engine started to work on it without an end or an orderly stop.
        end: How it ended; None if it has not.
    """

    generation_id: str
    job: Job
    delivery: DeliveryOptions
    created: float
    attempts: int = 0
    end: End | None = None


_record = TypeAdapter(Record)
_end = TypeAdapter(End)


def dump_record(record: Record) -> bytes:
    """Returns a record without its end and its attempts, as JSON."""
    return _record.dump_json(record, exclude={"attempts", "end"})


def dump_end(end: End) -> bytes:
    """Returns an end as JSON."""
    return _end.dump_json(end)


def parse_record(document: bytes) -> Record:
    """Returns a record from `dump_record`.

    Raises:
        ValueError: The JSON is invalid.
    """
    return _record.validate_json(document)


def parse_end(document: bytes) -> End:
    """Returns an end from `dump_end`.

    Raises:
        ValueError: The JSON is invalid.
    """
    return _end.validate_json(document)
