"""DeviceThread: the thread that calls the denoiser, while the model loads and afterwards."""

from __future__ import annotations

import queue
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from calotype_server.threads import contained, start

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DeviceThread"]

T = TypeVar("T")


class DeviceThread:
    """Runs functions one after the other in one thread.

    State that a device or a library keeps for a thread, such as a CUDA graph's, is then valid for all calls.
    """

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = start("device", self._run)

    def call(self, function: Callable[[], T]) -> T:
        """Returns the result of a function.

        Raises:
            Exception: As for `threads.contained`.
        """
        result: Future[T] = Future()

        def work() -> None:
            try:
                result.set_result(contained(function))
            except Exception as error:
                result.set_exception(error)

        self._work.put(work)
        return result.result()

    def end_with(self, function: Callable[[], object]) -> None:
        """Runs a function, after which the thread ends. Does not wait for it."""
        self._work.put(function)
        self._work.put(None)

    def close(self) -> None:
        """Ends the thread after the functions that were passed to it, and waits for that."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
