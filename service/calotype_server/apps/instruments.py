"""Metrics and traces of a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from calotype_server import __version__, threads
from calotype_server.observability import tracing
from calotype_server.observability.events import Observe, to_all
from calotype_server.observability.metrics import ServerMetrics

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Instruments"]


class Instruments:
    """Counts and traces what a server does. Leaving the `async with` block exports the remaining spans.

    Args:
        tracing_wanted: True to require OpenTelemetry, False to disable it, None to use it if its environment variables
            configure it.
        observers: Further receivers of the same events.

    Attributes:
        metrics: The Prometheus metrics.
        observe: Receives the events of all parts of the server. Thread-safe.

    Raises:
        TracingUnavailable: Tracing is required, but its packages are missing.
    """

    def __init__(self, tracing_wanted: bool | None, *observers: Observe) -> None:
        self.metrics = ServerMetrics(__version__)
        self._tracer: tracing.Tracing | None = None
        if tracing_wanted or (tracing_wanted is None and tracing.is_configured()):
            self._tracer = tracing.from_environment(__version__, required=bool(tracing_wanted))
        traces = () if self._tracer is None else (self._tracer.observe,)
        self.observe: Observe = to_all(self.metrics.observe, *traces, *observers)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tracer is not None:
            await threads.run("tracing", self._tracer.close)
