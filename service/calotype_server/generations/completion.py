"""Runs a generation to its end: exactly one end, on disk before any reader sees it, whatever happens on the way."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import structlog

from calotype_server import errors
from calotype_server.failpoints import hit
from calotype_server.observability.events import GenerationEnded
from calotype_server.observability.redaction import redact_in_logs
from calotype_server.types import Failed, Succeeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from calotype_server.generations.admission import Admission, QueueTicket
    from calotype_server.generations.generation import Generation
    from calotype_server.generations.index import GenerationIndex
    from calotype_server.generations.runner import Runner
    from calotype_server.observability.events import PhaseSpan

__all__ = ["Completion"]

_log = structlog.get_logger(__name__)


class Completion:
    """Runs generations to their ends. Lives in the event loop.

    Args:
        runner: Makes the images.
        admission: The queue in front of the engine.
        index: Stores and retains ended generations.
        on_ended: Called after an end was published.
        on_dead: Called when the engine cannot continue; must not raise.
    """

    def __init__(
        self,
        runner: Runner,
        admission: Admission,
        index: GenerationIndex,
        *,
        on_ended: Callable[[Generation], None],
        on_dead: Callable[[], None],
    ) -> None:
        self._runner = runner
        self._admission = admission
        self._index = index
        self._on_ended = on_ended
        self._on_dead = on_dead
        self._storing_given_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, generation: Generation, ticket: QueueTicket) -> None:
        """Runs a generation and ends it.

        An exception of any class, wherever it is raised, becomes a typed end and a line in the log, and the slot is
        free afterwards.

        Args:
            generation: The generation to run.
            ticket: Its place in the queue.
        """
        structlog.contextvars.bind_contextvars(generation=generation.id)
        redact_in_logs(generation.job.prompt, generation.job.negative_prompt)
        end: Succeeded | Failed | None = None
        phases: tuple[PhaseSpan, ...] = ()
        try:
            end = await self._runner.run(generation, ticket, partial(self._index.persist_attempt, generation))
            generation.decide_end()
            # Not persisted until `_store` has written it, which an exception may prevent.
            end = replace(end, persisted=not self._index.is_durable)
            phases = generation.stopwatch.phases()
            hit("runner.end")
            end = await self._store(generation, end)
        except asyncio.CancelledError:
            # The event loop closes. The generation runs again after a restart.
            end = end or Failed(errors.Draining("The server is stopping."), generation.stopwatch.timings())
            raise
        except BaseException:
            _log.exception("a generation could not be ended properly")
        finally:
            if end is None:
                failure = errors.GenerationFailed("The image could not be generated.")
                end = Failed(failure, generation.stopwatch.timings(), persisted=not self._index.is_durable)
            self._end(generation, ticket, end, phases or generation.stopwatch.phases())

    async def reject(self, generation: Generation, error: errors.ServiceError) -> None:
        """Ends a stored generation that may not run again, with `error`."""
        structlog.contextvars.bind_contextvars(generation=generation.id)
        redact_in_logs(generation.job.prompt, generation.job.negative_prompt)
        _log.error(
            "a stored generation does not run again",
            generation=generation.id,
            reason=error.reason,
            attempts=generation.attempts,
        )
        end = await self._store(generation, Failed(error, generation.stopwatch.timings()))
        self._end(generation, None, end, generation.stopwatch.phases())

    def give_up_storing(self) -> None:
        """Publishes all ends now, even if the disk has not stored them."""
        if not self._storing_given_up.done():
            self._storing_given_up.set_result(None)

    async def _store(self, generation: Generation, end: Succeeded | Failed) -> Succeeded | Failed:
        """Waits until an end is on disk, so that readers can rely on it; no longer than until `give_up_storing`.

        Returns the end, marked as not persisted if it is not on disk; a failure if the disk did not even accept the
        generation.
        """

        async def store() -> Succeeded | Failed:
            try:
                await generation.persisted()
            except errors.StateUnavailable as error:
                # Its caller was rejected.
                return Failed(error, end.timings, persisted=False)
            try:
                return await self._index.persist_end(generation, end)
            except asyncio.CancelledError:
                raise
            except BaseException:
                # Here and not in `run`: this is another task, and `SystemExit` in a task ends the event loop.
                _log.exception("the end of a generation could not be stored")
            return replace(end, persisted=False)

        storing = asyncio.ensure_future(store())
        await asyncio.wait((storing, self._storing_given_up), return_when=asyncio.FIRST_COMPLETED)
        return storing.result() if storing.done() else replace(end, persisted=False)

    def _end(
        self, generation: Generation, ticket: QueueTicket | None, end: Succeeded | Failed, phases: tuple[PhaseSpan, ...]
    ) -> None:
        """Publishes an end, and frees what the generation holds. Each part is done even if another one fails."""
        parts: tuple[Callable[[], None], ...] = (
            lambda: generation.end(end),
            lambda: self._on_ended(generation),
            # The engine's thread may still work, if something else failed.
            lambda: generation.stop.set() if isinstance(end, Failed) else None,
            lambda: None if ticket is None else self._admission.leave(ticket),
            lambda: self._index.end(generation),
            lambda: _report(generation, end, phases),
        )
        for part in parts:
            try:
                part()
            except BaseException:
                _log.exception("a generation ended, but not everything was updated")
        if isinstance(end, Failed) and isinstance(end.error, errors.EngineDead):
            self._on_dead()


def _report(generation: Generation, end: Succeeded | Failed, phases: tuple[PhaseSpan, ...]) -> None:
    outcome = "succeeded" if isinstance(end, Succeeded) else end.error.reason
    seconds = round(end.timings.total or 0.0, 3)
    # If the process ends now, the next one may give the generation another end.
    notes = {} if end.persisted else {"not_persisted": True}
    _log.info("generation ended", outcome=outcome, seconds=seconds, previews=dict(generation.previews), **notes)
    steps, rows = generation.events.state.step, generation.stopwatch.batch_rows
    generation.observe(GenerationEnded(generation.id, generation.job, end, phases, steps, rows))
