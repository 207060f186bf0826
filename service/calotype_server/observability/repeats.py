"""Bounds the log lines that clients can cause: a few per minute of each kind, and then how many more there were."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RepeatLimitingHandler"]

_LINES = 10
_SECONDS = 60.0
"""Lines of one kind in this time; further ones are only counted."""

_KINDS = 256
"""Kinds that are distinguished in that time. Further ones count together."""

_OWN = "calotype_server"
_PORTS = "calotype_server.transport"
"""Of our own lines, only those of the ports are limited: any stranger can cause them. The others are about generations
that the server has accepted, and about its operation."""


class RepeatLimitingHandler(logging.StreamHandler[TextIO]):
    """Writes log records to a stream, and limits those of libraries and ports.

    The kind of a record is its logger, level, text without arguments, reason and type of exception. The number of
    suppressed records of a kind is written before the next record of any kind, once their time has passed.

    Args:
        stream: Where to write.
        clock: Returns monotonic seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._kinds: dict[tuple[str, ...], _Kind] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a record, or counts it."""
        now = self._clock()
        self._write_counts(now - _SECONDS)
        if record.name.startswith(_OWN) and not record.name.startswith(_PORTS):
            super().emit(record)
            return
        key = _key(record)
        if key not in self._kinds and len(self._kinds) >= _KINDS:
            key = ("other",)
        kind = self._kinds.setdefault(key, _Kind(record, now))
        if kind.count():
            super().emit(record)

    def close(self) -> None:
        """Writes the numbers of all suppressed records."""
        self._write_counts(float("inf"))
        super().close()

    def _write_counts(self, until: float) -> None:
        """Forgets the kinds that started before `until`, and writes how many records of each were suppressed."""
        for key, kind in list(self._kinds.items()):
            if kind.started > until:
                # They are in the order in which they started.
                break
            del self._kinds[key]
            if kind.suppressed:
                super().emit(kind.summary())


class _Kind:
    """Counts the records of one kind."""

    def __init__(self, first: logging.LogRecord, started: float) -> None:
        self.started = started
        self.suppressed = 0
        self._written = 0
        self._name, self._level, self._text = first.name, first.levelno, _text(first)

    def count(self) -> bool:
        """Counts a record. Returns whether it may be written."""
        if self._written >= _LINES:
            self.suppressed += 1
            return False
        self._written += 1
        return True

    def summary(self) -> logging.LogRecord:
        text = f"{self._text} ({self.suppressed} similar messages suppressed)"
        return logging.LogRecord(self._name, self._level, "", 0, text, None, None)


def _key(record: logging.LogRecord) -> tuple[str, ...]:
    error = record.exc_info[0] if record.exc_info else None
    reason = record.msg.get("reason", "") if isinstance(record.msg, dict) else ""
    return record.name, record.levelname, _text(record), str(reason), "" if error is None else error.__name__


def _text(record: logging.LogRecord) -> str:
    """Returns the text of a record without its arguments; structlog passes a dictionary."""
    return str(record.msg["event"] if isinstance(record.msg, dict) else record.msg)[:200]
