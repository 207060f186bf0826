"""What is kept of a generation beyond the server's life, and its JSON.

Unknown fields are ignored and missing ones take their defaults: documents are read across versions that added some.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from calotype_server import errors
from calotype_server.types import DeliveryOptions, Job, Phase, Timings

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["End", "ImageFacts", "Record", "dump_end", "dump_record", "parse"]


def _revive(document: Any) -> errors.ServiceError:
    """Returns the error as it was; one whose reason is not known any more is a failed generation."""
    match document:
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
    }


def _kinds(base: type[errors.ServiceError]) -> Iterator[type[errors.ServiceError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


# Violations are told before there is a generation, and never kept.
_KINDS = {kind.reason: kind for kind in _kinds(errors.ServiceError) if kind is not errors.InvalidRequest}


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What is known of a final image without reading it; `size` is in bytes."""

    format: Literal["jpeg", "png", "webp"]
    width: int
    height: int
    size: int


@dataclass(frozen=True, slots=True)
class End:
    """How a generation ended.

    Attributes:
        at: When, in Unix seconds.
        step: Denoising steps done.
        total_steps: Denoising steps in all; 0 when that never became known.
        timings: Where the time went.
        finished_early: Whether the image is the estimate of `step`.
        image: Of the final image, or None when there is an error.
        error: Why there is no image, or None.
    """

    at: float
    step: int
    total_steps: int
    timings: Timings
    finished_early: bool = False
    image: ImageFacts | None = None
    error: Annotated[errors.ServiceError, PlainValidator(_revive), PlainSerializer(_describe)] | None = None

    @property
    def phase(self) -> Phase:
        """One of the three ends."""
        if self.error is None:
            return Phase.SUCCEEDED
        return Phase.CANCELLED if isinstance(self.error, errors.Cancelled) else Phase.FAILED


@dataclass(frozen=True, slots=True)
class Record:
    """An accepted generation.

    Attributes:
        generation_id: Its id.
        job: What was asked for, the seed among it.
        terms: What the caller wanted besides.
        created: When it was accepted, in Unix seconds.
        end: How it ended, or None when it had not.
    """

    generation_id: str
    job: Job
    terms: DeliveryOptions
    created: float
    end: End | None = None


_record = TypeAdapter(Record)
_end = TypeAdapter(End)


def dump_record(record: Record) -> str:
    """Returns all but the end, in JSON."""
    return _record.dump_json(record, exclude={"end"}).decode()


def dump_end(end: End) -> str:
    """Returns an end in JSON."""
    return _end.dump_json(end).decode()


def parse(record: bytes, end: bytes | None) -> Record:
    """Returns a record with its end, if it has one.

    Raises:
        ValueError: One of them is not what `dump_record` and `dump_end` return.
    """
    return replace(_record.validate_json(record), end=None if end is None else _end.validate_json(end))
