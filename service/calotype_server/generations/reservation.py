"""Reserves everything that new generations need before they are accepted: all of it, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calotype_server.types import Queued

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.auth.quotas import Quota
    from calotype_server.generations.admission import Admission, QueueTicket
    from calotype_server.generations.generation import Generation

__all__ = ["position_reporter", "reserve"]


def reserve(
    admission: Admission, generations: Sequence[Generation], quota: Quota | None, active: int
) -> list[QueueTicket]:
    """Takes a place in the queue or a slot for each generation, and charges the quota.

    A rejection uses up nothing. Does not give control to the event loop.

    Args:
        admission: The queue.
        generations: New generations of one caller, with the same deadline; at least one.
        quota: Limits of the caller.
        active: Number of the caller's generations that wait or run.

    Raises:
        InvalidRequest: Together the generations exceed a limit even when nothing else waits or runs.
        RateLimited: The quota is exhausted for now.
        QueueFull: The queue has too few free places.
        DeadlineTooShort: Not all images can be ready before the deadline.
    """
    jobs = [generation.job for generation in generations]
    delivery = generations[0].delivery
    if len(jobs) > 1:
        # First, because the other errors suggest a retry.
        admission.require_possible(jobs, delivery.caller)
    if quota is not None:
        quota.check(jobs, active)
    entries = [(generation.job, position_reporter(generation)) for generation in generations]
    tickets = admission.enter_all(entries, delivery.caller, delivery.deadline)
    if quota is not None:
        quota.charge(jobs)
    return tickets


def position_reporter(generation: Generation) -> Callable[[int, float | None], None]:
    """Returns a function that publishes the position in the queue and the estimated seconds to the final image."""

    def report(position: int, remaining: float | None) -> None:
        generation.events.publish(Queued(position, remaining))

    return report
