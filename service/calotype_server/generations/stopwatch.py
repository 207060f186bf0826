"""Measures how long each phase of a generation takes."""

from __future__ import annotations

import time

from calotype_server.observability.events import PhaseSpan
from calotype_server.types import Decoding, Denoising, EncodingPrompt, Event, PreviewReady, Timings

__all__ = ["Stopwatch"]


class Stopwatch:
    """Records when a generation first reaches each phase. Times are seconds of the monotonic clock.

    Attributes:
        events: Number of events recorded. The watchdog takes a rising number as progress.
        batch_rows: Mean number of rows in the denoiser calls of this generation, as reported by the engine.
    """

    def __init__(self) -> None:
        self._accepted = time.monotonic()
        self._reached: dict[type[Event], float] = {}
        self._drawn: float | None = None
        self._step: tuple[int, float] | None = None
        self.events = 0
        self.batch_rows = 0.0
        self._computed_steps = 0

    @property
    def total(self) -> float:
        """Seconds since the generation was accepted."""
        return time.monotonic() - self._accepted

    def note(self, event: Event) -> bool:
        """Records an event and returns whether it is the first of its kind."""
        self.events += 1
        first = type(event) not in self._reached
        if first:
            self._reached[type(event)] = time.monotonic()
        if isinstance(event, Decoding):
            self.batch_rows, self._computed_steps = event.batch_rows, event.computed_steps
            if event.seconds:
                self._reached[Decoding] = time.monotonic() - event.seconds
        return first

    def note_drawn(self) -> None:
        """Records that the engine returned the pixels; only the image file is missing."""
        self._drawn = time.monotonic()

    def phases(self) -> tuple[PhaseSpan, ...]:
        """Returns the phases reached so far; the last one ends now."""
        started, denoising, decoding = (self._reached.get(kind) for kind in (EncodingPrompt, Denoising, Decoding))
        begins = {
            "queue": self._accepted,
            "encode_prompt": started,
            "denoise": denoising,
            "decode": decoding,
            "encode_image": self._drawn,
        }
        known = [(name, begin) for name, begin in begins.items() if begin is not None]
        ends = [*(begin for _, begin in known[1:]), time.monotonic()]
        return tuple(PhaseSpan(name, begin, end) for (name, begin), end in zip(known, ends, strict=True))  # type: ignore[arg-type]

    def step_seconds(self, step: int) -> float | None:
        """Returns the seconds per step since the previous call; None on the first call and when no step was done."""
        before, now = self._step, time.monotonic()
        if before is not None and step <= before[0]:
            return None
        self._step = step, now
        return None if before is None else (now - before[1]) / (step - before[0])

    def timings(self) -> Timings:
        """Returns the durations up to now."""
        now = time.monotonic()
        started, denoising, decoding, preview = (
            self._reached.get(kind) for kind in (EncodingPrompt, Denoising, Decoding, PreviewReady)
        )
        return Timings(
            queued=_span(self._accepted, started or now),
            encoding_prompt=_span(started, denoising or now),
            denoising=_span(denoising, decoding or now),
            decoding=_span(decoding, now),
            first_preview=_span(self._accepted, preview),
            total=now - self._accepted,
            computed_steps=self._computed_steps,
        )


def _span(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else end - begin
