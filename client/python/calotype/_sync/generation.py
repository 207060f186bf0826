# Generated from calotype/_async/generation.py by `make sync-client`; do not edit.
"""A generation: iterate over its progress, wait for its image, finish or cancel it.

`_resume` decides what happens when the connection is lost; this module makes the calls and waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from .._backends.threads.primitives import Event, Lock
from .._errors import CalotypeError, Cancelled, ClientClosed
from .._generation import BaseGeneration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from .._image import Image
    from .._resume.policy import Resumption
    from .._types import Phase, Progress
    from .calls import Calls

__all__ = ["Generation"]


class Generation(BaseGeneration):
    """A generation on the server. Made by `Client.generate` and `Client.watch`.

    Usage::

        with client.generate("a red apple") as generation:
            for progress in generation:
                print(progress.phase, progress.step, progress.preview)
            image = generation.result()

    Iterate over it once to receive its `Progress`. The loop ends after success and raises a `CalotypeError` when the
    generation fails. When the connection is lost, the client reconnects and the loop continues; see `Client`.

    Leaving the loop before the end, by `break` or an exception, cancels the generation on the server. So does leaving
    its `with` block. A generation started with `on_disconnect="keep"`, or one that is only watched, continues;
    only `cancel` ends it.

    Python implementations without reference counting, such as PyPy, may cancel some time after a `break`; leaving
    a `with` block cancels immediately.
    """

    def __init__(
        self,
        calls: Calls,
        resumption: Resumption,
        on_reconnect: Callable[[CalotypeError, float], None] | None = None,
    ) -> None:
        super().__init__(resumption, on_reconnect)
        self._calls = calls
        self._lock = Lock()
        self._left = Event()
        self._call = calls.start(resumption)

    def __iter__(self) -> Iterator[Progress]:
        self._start_iterating()
        try:
            while not self._assembler.ended:
                if (progress := self._advance()) is not None:
                    yield progress
            self._assembler.outcome()
        finally:
            self._leave()

    def result(self) -> Image:
        """Waits for the end and returns the final image. Can be called again, and inside the loop.

        An exception that ends the wait early, such as an interrupt, cancels the generation on the server.

        Raises:
            CalotypeError: The generation ended without an image.
        """
        try:
            while not self._assembler.ended:
                self._advance()
        finally:
            self._leave()
        return self._assembler.outcome()

    def finish(self) -> Phase:
        """Ends the generation early; the current estimate becomes the final image.

        Waits for the first message, then up to 10 s for the answer.

        Returns:
            The phase of the generation when the request arrived. If the phase is an end, there was nothing to finish.

        Raises:
            NotFound: The server no longer knows the generation.
            CalotypeError: The server rejected the generation, or the call failed.
            ClientClosed: The client is closed.
        """
        while self.id is None and not self._assembler.ended:
            self._advance()
        if self.id is None:
            self._assembler.outcome()
        return self._calls.finish(self.id or "")

    def cancel(self) -> None:
        """Cancels the generation on the server, even when it is kept or only watched. Does nothing after its end.

        Returns without waiting. The loop and `result` then raise `Cancelled`.
        """
        self._leave(Cancelled("Cancelled by this client."), cancel=True)

    def _leave(self, reason: CalotypeError | None = None, *, cancel: bool = False) -> None:
        """Closes the call, and cancels by id where closing alone would keep the generation running. Never waits."""
        if self._close(reason, cancel=cancel):
            self._calls.send_cancel(self._resumption)

    def _close(self, reason: CalotypeError | None = None, *, cancel: bool = False) -> bool:
        """Closes the call. Returns whether the generation must be cancelled on the server to end now."""
        resumption = self._resumption
        cancel = cancel or resumption.leaving_cancels
        if not self._assembler.ended:
            text = "Cancelled by this client." if cancel else "This client has left; `watch` follows it again."
            self._assembler.close(reason or Cancelled(text))
            self._left.set()
            self._call.cancel()
        if not resumption.unsettled:
            return False
        resumption.settle()
        return cancel and resumption.lingers

    def _advance(self) -> Progress | None:
        """Takes one message, or makes the next call when the current one is lost."""
        with self._lock:
            try:
                message = self._calls.read(self._call)
            except CalotypeError as error:
                self._reconnect(self._lost(error))
                return None
            progress = self._take(message)
            if self._assembler.ended:
                self._calls.drain(self._call)
            return progress

    def _reconnect(self, delay: float | None) -> None:
        if delay is None or self._left.wait(delay):
            return
        try:
            self._call = self._calls.restart(self._resumption)
        except ClientClosed:
            self._assembler.close(Cancelled("The client was closed."))
        # `_leave` may have cancelled the previous call while this one was being made.
        if self._assembler.ended:
            self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()
