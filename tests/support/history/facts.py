"""The facts of a history, in the order in which they were recorded."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

__all__ = [
    "CRASHED",
    "REPLACEABLE",
    "SUCCEEDED",
    "Crashed",
    "Dropped",
    "Fact",
    "Forgot",
    "Left",
    "Listed",
    "Logged",
    "Opened",
    "Refused",
    "Saw",
    "SawEnd",
    "Settled",
    "Stopped",
    "Stored",
]

SUCCEEDED = "SUCCEEDED"
"""The outcome of a generation with an image. Every other outcome is the reason of an error."""

CRASHED = "ENGINE_CRASHED"
"""The outcome of a generation that the server stopped trying."""

REPLACEABLE = frozenset({"ABANDONED", "DRAINING", "STATE_UNAVAILABLE"})
"""After an end with one of these reasons, the same request id may start another generation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """Something that happened. `at` is on the clock of `time.monotonic`, in seconds."""

    at: float = field(default_factory=time.monotonic, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Fact):
    """A caller opened a stream, or a client that reconnects on its own started to follow a generation.

    Attributes:
        reader: Number of the reader.
        caller: The caller's name, or its key.
        request_id: The request's id, or "".
        recipe: Everything that determines the image, or "" if this does not matter.
    """

    reader: int
    caller: str = ""
    request_id: str = ""
    recipe: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saw(Fact):
    """A reader received a message. `phase` is the name of the phase in lower case."""

    reader: int
    generation: str
    sequence: int
    phase: str
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SawEnd(Fact):
    """A reader received an end.

    Attributes:
        reader: Number of the reader.
        generation: Id of the generation.
        outcome: SUCCEEDED or the reason of the error.
        image: SHA-256 of the final image, or "".
        early: Whether `finish` ended the generation.
        persisted: Whether the server says that the end is durable; False if it reports that it is not.
    """

    reader: int
    generation: str
    outcome: str
    image: str = ""
    early: bool = False
    persisted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Fact):
    """A call ended with an error before its generation ended. `reason` is empty if the connection broke."""

    reader: int
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Left(Fact):
    """A caller stopped reading on purpose."""

    reader: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored(Fact):
    """A generation in the store.

    Attributes:
        generation: Id of the generation.
        caller: Id of the owner.
        request_id: The request's id, or "".
        outcome: SUCCEEDED, the reason of the error, or None if the generation has not ended.
        image: SHA-256 of the final image, or "".
        attempts: Times that the engine got the job without an end.
    """

    generation: str
    caller: str = ""
    request_id: str = ""
    outcome: str | None = None
    image: str = ""
    attempts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed(Fact):
    """A generation in a list that the server returned. `phase` is in lower case."""

    generation: str
    phase: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Logged(Fact):
    """A line of the log.

    Attributes:
        generation: Id of the generation, or "".
        event: The text of the line.
        level: The level in lower case.
        outcome: The end of a generation that the line reports, or "".
        persisted: As for `SawEnd`.
    """

    generation: str
    event: str
    level: str = "info"
    outcome: str = ""
    persisted: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Crashed(Fact):
    """The server's process was killed or exited without draining."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped(Fact):
    """The server no longer retains a generation that ended."""

    generation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Fact):
    """The server received SIGTERM. `code` is its exit code, or None if it ignored the signal."""

    code: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgot(Fact):
    """A server without a state folder ended, or a state folder was deleted: its generations are gone.

    Attributes:
        replica: The tag that begins the ids of these generations.
    """

    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled(Fact):
    """The server when all callers were done.

    Attributes:
        active: Occupied slots.
        waiting: Occupied places in the queue.
    """

    active: int
    waiting: int
