"""Faults for failpoints: a small language, and actions that follow it.

A fault is `FAILPOINT=ACTION`, optionally with an argument, a turn and a probability: `store.end=raise:full`,
`engine.step=delay:0.2@3` (only the third time), `encoder.preview=hang%0.01` (one time in a hundred).

| action | effect |
|---|---|
| `raise`, `raise:KIND` | raises an exception of `KINDS`, by default a RuntimeError |
| `delay:SECONDS` | sleeps |
| `hang` | blocks until the process ends, or until `Faults.release` |
| `exit` | ends the process immediately, like a crash |
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import random
import re
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from calotype_server.failpoints import FAILPOINTS, injected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["ACTIONS", "EXIT_CODE", "KINDS", "Fault", "Faults", "Panic", "full_disk"]

ACTIONS = ("raise", "delay", "hang", "exit")

EXIT_CODE = 97
"""Exit code of the action `exit`."""


class Panic(BaseException):
    """An exception that `except Exception` does not catch, like a panic of a library in Rust."""


def full_disk() -> sqlite3.OperationalError:
    """Returns the error that SQLite raises when the disk is full."""
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


KINDS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: RuntimeError("injected"),
    "panic": lambda: Panic("injected"),
    "memory": MemoryError,
    "exit": SystemExit,
    "disk": lambda: OSError(28, "No space left on device"),
    "full": full_disk,
}
"""Exceptions of the action `raise`."""

_SPEC = re.compile(
    rf"(?P<name>[\w.]+)=(?P<action>{'|'.join(ACTIONS)})(?::(?P<argument>[\w.]+))?(?:@(?P<turn>\d+))?(?:%(?P<chance>[\d.]+))?"
)

_log = structlog.get_logger("calotype_server.faults")


def in_event_loop() -> bool:
    """Whether the caller runs in an event loop, which a hang stops completely."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a failpoint.

    Attributes:
        name: The failpoint.
        action: One of `ACTIONS`.
        argument: The kind of the exception, or seconds.
        turn: Only at this visit of the failpoint, counted from 1; None for every visit.
        chance: Probability at each visit, 0 to 1.
    """

    name: str
    action: str
    argument: str = ""
    turn: int | None = None
    chance: float = 1.0

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Returns the fault of a text such as `store.end=raise:full@2`.

        Raises:
            ValueError: The text is not a fault, or there is no such failpoint or exception.
        """
        found = _SPEC.fullmatch(spec)
        if found is None or found["name"] not in FAILPOINTS:
            raise ValueError(f"not a fault: {spec!r}")
        if found["action"] == "raise" and (found["argument"] or "error") not in KINDS:
            raise ValueError(f"not an exception: {found['argument']!r}")
        turn = int(found["turn"]) if found["turn"] else None
        return cls(found["name"], found["action"], found["argument"] or "", turn, float(found["chance"] or 1))


class Faults:
    """Injects faults during a `with` block. Thread-safe.

    Args:
        faults: The faults, at most one for each failpoint.
        seed: Of the probabilities.
        control: A file with faults, separated by white space. It replaces `faults` whenever it changes, so that a test
            can switch faults in another process.

    Attributes:
        visits: How often each failpoint was reached.
        hits: How often each failpoint's fault happened.
        reached: Set at the first fault.
    """

    def __init__(self, faults: Sequence[Fault] = (), *, seed: int = 0, control: Path | None = None) -> None:
        self._faults = {fault.name: fault for fault in faults}
        self._random = random.Random(seed)
        self._control = control
        self._read = 0
        self._lock = threading.Lock()
        self._released = threading.Event()
        self._stack = contextlib.ExitStack()
        self.visits: Counter[str] = Counter()
        self.hits: Counter[str] = Counter()
        self.reached = threading.Event()

    def __enter__(self) -> Self:
        for name in FAILPOINTS if self._control else self._faults:
            self._stack.enter_context(injected(name, functools.partial(self._visit, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        self._stack.close()

    def release(self) -> None:
        """Ends every hang, also future ones."""
        self._released.set()

    def _visit(self, name: str) -> None:
        with self._lock:
            self._reread()
            self.visits[name] += 1
            fault = self._faults.get(name)
            if fault is None or fault.turn not in (None, self.visits[name]) or self._random.random() >= fault.chance:
                return
            self.hits[name] += 1
        self.reached.set()
        place = "event loop" if in_event_loop() else "thread"
        _log.warning("fault injected", failpoint=name, action=fault.action, argument=fault.argument, place=place)
        match fault.action:
            case "raise":
                raise KINDS[fault.argument or "error"]()
            case "delay":
                time.sleep(float(fault.argument or 0.05))
            case "hang":
                self._released.wait()
            case "exit":
                os._exit(EXIT_CODE)

    def _reread(self) -> None:
        if self._control is None or not self._control.exists():
            return
        changed = self._control.stat().st_mtime_ns
        if changed != self._read:
            self._read = changed
            self._faults = {fault.name: fault for fault in map(Fault.parse, self._control.read_text().split())}
