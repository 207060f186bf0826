"""The thread that works for the store: one call after another, each with a timeout."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from calotype_server import errors, threads
from calotype_server.failpoints import hit

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

__all__ = ["RETRY_SECONDS", "StoreThread", "unavailable"]

_log = structlog.get_logger(__name__)

RETRY_SECONDS: Final = 5.0
"""Time after which callers should try again."""

T = TypeVar("T")


class StoreThread:
    """Runs calls that may hang. Lives in the event loop.

    A call that does not return in time keeps the thread. Later calls then fail at once, until it returns.

    Args:
        seconds: Longest duration of a call, including the calls before it.

    Attributes:
        seconds: As given.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._hanging: Future[Any] | None = None
        self._executor = ThreadPoolExecutor(1, "calotype-store")

    @property
    def hangs(self) -> bool:
        """Whether a call has not returned in time and still works."""
        return self._hanging is not None and not self._hanging.done()

    async def run(self, function: Callable[[], T], *, patient: bool = False, seconds: float | None = None) -> T:
        """Returns the result of a function.

        Args:
            function: Called in the thread.
            patient: Whether the call may take any time.
            seconds: A shorter duration than that of all calls; None for that one.

        Raises:
            ServiceError, StartupError: Raised by the function.
            StateUnavailable: The disk does not respond, or the function raised something else, which is logged.
        """
        if self.hangs:
            raise unavailable()
        limit = self.seconds if seconds is None else min(seconds, self.seconds)
        work = threads.submit(self._executor, _call, function)
        if not await threads.completes(work, None if patient else limit):
            # A call that waits behind another one is taken back.
            if not work.cancel():
                self._hanging = work
                work.add_done_callback(lambda _: _log.warning("the state folder responds again"))
                _log.error("the state folder does not respond", stacks=threads.stacks())
            raise unavailable()
        try:
            return work.result()
        except (errors.ServiceError, errors.StartupError):
            raise
        except Exception as error:
            _log.exception("a call of the state failed")
            raise unavailable() from error

    async def responsive(self) -> None:
        """Waits until the call that hangs, if there is one, has returned."""
        if self._hanging is not None:
            await threads.completes(self._hanging, None)

    def close(self) -> None:
        """Ends the thread after its current call, without waiting for it."""
        self._executor.shutdown(wait=False)


def unavailable() -> errors.StateUnavailable:
    """Returns the error for a caller, without details."""
    return errors.StateUnavailable("The server cannot access its state right now.", retry_after=RETRY_SECONDS)


def _call(function: Callable[[], T]) -> T:
    hit("store.call")
    return function()
