"""DenoiserSession: one request's access to the shared denoiser."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from calotype_server.engine.batching.pending import PendingCall, RequestSlot
from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.tap import Stopped

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from calotype_server.engine.runtime.collate import Call, Collator, Digests
    from calotype_server.engine.step_cache.cache import StepCache
    from calotype_server.types import Lora

__all__ = ["CallQueue", "DenoiserSession"]


class CallQueue(Protocol):
    """Runs the calls of sessions; implemented by `StepBatcher`."""

    @property
    def module(self) -> Any:
        """The denoiser."""
        ...

    @property
    def collator(self) -> Collator:
        """Joins calls of that denoiser."""
        ...

    @property
    def mixes_loras(self) -> bool:
        """Whether calls with different LoRAs may be joined."""
        ...

    def submit(self, pending: PendingCall) -> None:
        """Queues a call; its future receives the answer."""
        ...

    def note_look(self, slot: RequestSlot) -> None:
        """Records that a request has finished its first step."""
        ...

    def stop_waiting_for(self, slot: RequestSlot) -> None:
        """Lets other requests run without waiting for this one."""
        ...

    def withdraw(self, slot: RequestSlot, pending: PendingCall | None) -> None:
        """Stops waiting for a request, and makes its call raise `Stopped` at once."""
        ...


class DenoiserSession:
    """One request's access to the denoiser. Use it as a context manager, and leave it when the request has ended.

    `cancel` may be called by any thread, everything else only by the request's own.

    Args:
        queue: Runs the calls.
        number: Identifies the session in records of batches.
        should_stop: Called before each call of the denoiser; True raises `Stopped`.
        on_submitted: Called after each call of the denoiser is submitted, before its answer is awaited, and after each
            call that is not computed.
        cache: Decides which calls are computed; None for all.
        loras: LoRAs to apply to all calls.
        alone: Whether its calls are never joined with those of other requests.
    """

    def __init__(
        self,
        queue: CallQueue,
        number: int,
        should_stop: Callable[[], bool],
        on_submitted: Callable[[], None],
        cache: StepCache | None = None,
        loras: tuple[Lora, ...] = (),
        alone: bool = False,
    ) -> None:
        self._queue = queue
        self._alone = alone
        self._should_stop = should_stop
        self._on_submitted = on_submitted
        self._cache = cache
        self._loras = loras
        self._digests: Digests = {}
        self._slot = RequestSlot(number)
        self._pending: PendingCall | None = None
        self._cancelled = False
        self._calls = self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.expect_no_more()
        self._digests.clear()
        self._pending = None

    @property
    def number(self) -> int:
        """Number of the session, from 0, in the order of opening."""
        return self._slot.number

    @property
    def mean_rows(self) -> float:
        """Mean number of rows that were computed together with a call of this request, its own included."""
        return self._rows / self._calls if self._calls else 0.0

    def proxy(self) -> DenoiserProxy:
        """Returns the object to use in place of the denoiser."""
        return DenoiserProxy(self._queue.module, self._call)

    def note_look(self) -> None:
        """Announces that the first step is done. Until then, the request may run before older ones."""
        self._queue.note_look(self._slot)

    def expect_no_more(self) -> None:
        """Announces that the last step is done, so that other requests do not wait. A further call is still served."""
        self._queue.stop_waiting_for(self._slot)

    def cancel(self) -> None:
        """Makes the request's waiting call, or else its next one, raise `Stopped` at once."""
        # The order matters: a call that is submitted meanwhile either sees the flag or is withdrawn.
        self._cancelled = True
        self._queue.withdraw(self._slot, self._pending)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self._should_stop():
            raise Stopped
        call = self._queue.collator.bind(args, kwargs, self._digests)
        if self._loras:
            call = replace(call, loras=self._loras)
        if self._cache is None:
            return self._compute(call)
        calls = self._calls
        answer = self._cache.answer(call.kind, lambda: self._compute(call))
        if self._calls == calls:
            self._on_submitted()
        if self._cache.skips_next:
            self._queue.stop_waiting_for(self._slot)
        return answer

    def _compute(self, call: Call) -> Any:
        self._pending = pending = PendingCall(self._slot, call, time.monotonic(), apart=self._apart(call))
        if self._cancelled:
            raise Stopped
        self._queue.submit(pending)
        try:
            self._on_submitted()
        except BaseException:
            self._queue.withdraw(self._slot, pending)
            raise
        answer = pending.future.result()
        self._calls += 1
        self._rows += pending.batch_rows
        return answer

    def _apart(self, call: Call) -> Hashable:
        """Returns a value that the calls to join have in common; None if the signature alone decides."""
        if self._alone:
            return self.number
        return None if self._queue.mixes_loras else call.loras
