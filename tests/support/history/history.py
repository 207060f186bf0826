"""Records the facts of a run. Thread-safe."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from support.history.facts import (
    SUCCEEDED,
    Crashed,
    Dropped,
    Fact,
    Forgot,
    Left,
    Listed,
    Logged,
    Opened,
    Refused,
    Saw,
    SawEnd,
    Settled,
    Stopped,
)
from support.history.rows import stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import calotype

__all__ = ["History", "ReaderLog", "digest"]


def digest(image: bytes | None) -> str:
    """Returns the SHA-256 of an image, or "" without one."""
    return "" if not image else hashlib.sha256(image).hexdigest()


class History:
    """Everything that a run showed, in order.

    Args:
        deterministic: Whether the same recipe must give the same bytes.

    Attributes:
        facts: In the order in which they were recorded.
        tried: Number of requests and faults by kind, for reports.
    """

    def __init__(self, *, deterministic: bool = True) -> None:
        self.deterministic = deterministic
        self.facts: list[Fact] = []
        self.tried: Counter[str] = Counter()
        self._readers = itertools.count(1)

    def add(self, fact: Fact) -> None:
        """Adds a fact."""
        self.facts.append(fact)

    def reader(self, *, caller: str = "", request_id: str = "", recipe: str = "") -> ReaderLog:
        """Opens the log of a reader; arguments as for `Opened`."""
        reader = ReaderLog(self, next(self._readers))
        self.add(Opened(reader=reader.number, caller=caller, request_id=request_id, recipe=recipe))
        return reader

    async def store(self, folder: Path) -> None:
        """Adds the generations of a state folder; none if there is no such folder."""
        async for row in stored(folder):
            self.add(row)

    def log(self, lines: Iterable[str]) -> None:
        """Adds the lines of a log in JSON; other lines are ignored."""
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                self.entries([entry])

    def entries(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds log entries, such as those of `structlog.testing.capture_logs`."""
        for entry in entries:
            level = str(entry.get("level", entry.get("log_level", "info")))
            outcome = str(entry.get("outcome", entry.get("reason", ""))).upper()
            event, generation = str(entry.get("event", "")), str(entry.get("generation", ""))
            if event == "fault injected":
                self.tried[f"fault {entry['failpoint']} {entry['action']}"] += 1
            persisted = not entry.get("not_persisted", False)
            self.add(Logged(generation=generation, event=event, level=level, outcome=outcome, persisted=persisted))

    def listed(self, summaries: Iterable[calotype.GenerationSummary]) -> None:
        """Adds a list that a server returned."""
        for each in summaries:
            self.add(Listed(generation=each.generation_id, phase=each.phase.value))

    def crashed(self, *, forgets: str = "") -> None:
        """The server's process ended without draining. A server without a state folder `forgets` ids with this tag."""
        self.add(Crashed())
        if forgets:
            self.add(Forgot(replica=forgets))

    def stopped(self, code: int | None) -> None:
        """The server received SIGTERM and exited with `code`; None says that it did not exit in time."""
        self.add(Stopped(code=code))

    def dropped(self, generation: str) -> None:
        """The server no longer retains a generation that ended, so its request id is free."""
        self.add(Dropped(generation=generation))

    def settled(self, *, active: int, waiting: int) -> None:
        """All callers are done, and the server reports these numbers."""
        self.add(Settled(active=active, waiting=waiting))


class ReaderLog:
    """The part of a history that one reader saw. It must end with `ended`, `refused` or `left`.

    Args:
        history: Receives the facts.
        number: Distinguishes readers.

    Attributes:
        number: Distinguishes readers.
        generation: Id of the generation that the newest message was from, or "".
        outcome: The end, or "".
    """

    def __init__(self, history: History, number: int) -> None:
        self.number = number
        self.generation = ""
        self.outcome = ""
        self._history = history

    def saw(self, generation: str, sequence: int, phase: str, step: int) -> None:
        """Adds a message; `phase` is in lower case."""
        self.generation = generation
        self._history.add(
            Saw(reader=self.number, generation=generation, sequence=sequence, phase=phase.lower(), step=step)
        )

    def ended(
        self, outcome: str = SUCCEEDED, image: bytes | None = None, *, early: bool = False, persisted: bool = True
    ) -> None:
        """Adds the end of the generation that the last message was from; arguments as for `SawEnd`."""
        self.outcome = outcome
        self._history.add(
            SawEnd(
                reader=self.number,
                generation=self.generation,
                outcome=outcome,
                image=digest(image),
                early=early,
                persisted=persisted,
            )
        )

    def refused(self, reason: str = "") -> None:
        """The call ended with an error before its generation ended."""
        self._history.add(Refused(reader=self.number, reason=reason))

    def left(self) -> None:
        """The caller stopped reading."""
        self._history.add(Left(reader=self.number))
