"""The product's runtime around any engine, with the settings that a test needs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from calotype_server import errors
from calotype_server.api.service import GenerationService
from calotype_server.apps.instruments import Instruments
from calotype_server.apps.runtime import Runtime
from calotype_server.observability.events import Observe, ignore
from calotype_server.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from calotype_server.engine.protocol import Engine, Stop
    from calotype_server.generations.store import Store
    from calotype_server.types import Event, Job, Pixels


class WithSlots:
    """Wraps an engine and overrides the number of slots of its model.

    Args:
        engine: Receives all calls.
        max_active: Number of slots.
    """

    def __init__(self, engine: Engine, max_active: int) -> None:
        self.engine = engine
        self.model = replace(engine.model, max_active=max_active)

    def run(self, job: Job, report: Callable[[Event], None], stop: Stop) -> Pixels:
        """Calls the wrapped engine."""
        return self.engine.run(job, report, stop)

    def note_preview_encoding(self, seconds: float) -> None:
        """Calls the wrapped engine."""
        self.engine.note_preview_encoding(seconds)

    def close(self) -> None:
        """Calls the wrapped engine."""
        self.engine.close()


@contextlib.asynccontextmanager
async def running_runtime(
    engine: Engine,
    *,
    service: GenerationService | None = None,
    store: Store | None = None,
    observe: Observe = ignore,
    max_active: int = 1,
    **settings: Any,
) -> AsyncIterator[Runtime]:
    """Runs a runtime without warm-up, watchdog or drain for the duration of the block.

    Args:
        engine: The engine; its model gets `max_active` slots.
        service: Opened when the runtime runs.
        store: Keeps generations across restarts.
        observe: Receives all events.
        max_active: Number of slots.
        settings: Further fields of `Settings`.
    """
    given = {"drain_seconds": 0, "watchdog_seconds": 0, **settings}
    if "max_queue" in given:
        # Most tests have one caller, which may fill the queue.
        given.setdefault("max_queue_per_caller", given["max_queue"])
    async with Runtime(
        Settings(**given),
        WithSlots(engine, max_active),
        service=service or GenerationService(Settings().limits),
        instruments=Instruments(False, observe),
        store=store,
        warm_up=False,
    ) as runtime:
        try:
            yield runtime
        finally:
            # Abort first, then release the steps that the test still holds: none of them may end as succeeded.
            for generation in runtime.generations.running:
                generation.abort(errors.Draining("The test is over."))
            engine.close()
