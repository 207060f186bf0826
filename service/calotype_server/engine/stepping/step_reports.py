"""Reports the progress of a request while the device works, instead of before the request's next call."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from calotype_server.types import Denoising

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.types import Event

__all__ = ["StepReports"]


class StepReports:
    """Passes the events of one request on, and holds the progress of a step until the device has its next call.

    A report wakes the event loop, which takes Python's lock at once: the request's thread would continue to the next
    call only when all messages are sent, while the device has nothing to do. Only progress that the thread itself
    reports is held. Every other event passes at once, after the one that is held.

    Args:
        report: Receives the events.
    """

    def __init__(self, report: Callable[[Event], None]) -> None:
        self._report = report
        self._thread = threading.get_ident()
        self._holding = False
        self._held: Denoising | None = None

    def hold(self) -> None:
        """Begins to hold progress: from now on, `flush` is called after each call of the denoiser is submitted."""
        self._holding = True

    def __call__(self, event: Event) -> None:
        """Reports an event. Thread-safe."""
        if threading.get_ident() == self._thread:
            self.flush()
            if self._holding and isinstance(event, Denoising) and event.step < event.total_steps:
                self._held = event
                return
        self._report(event)

    def flush(self) -> None:
        """Reports the progress that is held, if there is any. Only for the request's thread."""
        held, self._held = self._held, None
        if held is not None:
            self._report(held)
