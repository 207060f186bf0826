"""Computes previews next to the denoiser without delaying it, and measures what the device spends on them.

On a CPU the preview thread itself computes them. On CUDA the thread uses its own stream, which waits on the device for
the step's tensors while the denoiser's stream continues. On XPU and MPS it uses the denoiser's stream. Nothing here was
measured on XPU or MPS.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "CpuStream",
    "CudaStream",
    "DeviceStream",
    "Elapsed",
    "Lap",
    "SharedStream",
    "call_in_order",
    "device_stream",
]

_MAX_LEAD_SECONDS = 0.2
"""Longest time for which the device spins before a measurement."""
_CYCLES_PER_SECOND = 3e9
"""At least as many as GPUs have: a lower clock makes the time longer."""


class Elapsed:
    """Upper bound of the time that previews took from the denoiser, in seconds; known when the block has ended."""

    seconds = 0.0


class Lap(Protocol):
    """The time that a thread's work takes on the device of the model, from the creation of this object to `stop`."""

    def stop(self) -> None:
        """Ends the lap at the work that was launched last. The calling thread is the one that started it."""
        ...

    def device_seconds(self) -> float | None:
        """Returns the time on a device that computes later than the thread launches; None on other devices.

        Call it when the work is computed.
        """
        ...

    def computing_seconds(self, threads: int) -> float:
        """Returns the computing time: of the device, or of all CPU threads together. Call it when the work is computed.

        Args:
            threads: CPU threads that did the work, if a CPU did.
        """
        ...


class DeviceStream(Protocol):
    """Interface of the implementations.

    Attributes:
        fast: Whether a whole image is decoded in much less than a second.
    """

    fast: bool

    def record(self) -> torch.cuda.Event | None:
        """Marks the point at which a step's tensors were launched. The denoiser's thread calls it; returns at once."""
        ...

    def after(self, events: Sequence[torch.cuda.Event | None]) -> contextlib.AbstractContextManager[Elapsed]:
        """Opens a block in which the preview thread can read the tensors launched before these events.

        All work of the block is finished when it ends, also with an exception.
        """
        ...

    def cost(self, work: Callable[[], Any]) -> float:
        """Returns the computing time of `work` in seconds, without the time to launch it if possible.

        It runs a few times. Nothing else should use the device.
        """
        ...

    def lap(self) -> Lap:
        """Starts to measure work of the calling thread, which need not be the preview thread."""
        ...


class CpuStream:
    """Computes previews on the CPU, in the preview thread."""

    fast = False

    def record(self) -> None:
        """Does nothing: on a CPU a tensor that exists is computed."""

    @contextlib.contextmanager
    def after(self, events: Sequence[torch.cuda.Event | None]) -> Iterator[Elapsed]:
        """Waits for nothing; measures the CPU time of the thread, not the time that passes."""
        elapsed, started = Elapsed(), time.thread_time()
        yield elapsed
        elapsed.seconds = time.thread_time() - started

    def cost(self, work: Callable[[], Any]) -> float:
        """Measures the CPU time of the second run: the first one warms up caches."""
        work()
        with self.after(()) as elapsed:
            work()
        return elapsed.seconds

    def lap(self) -> Lap:
        """Measures the time that passes."""
        return _WallLap()


class SharedStream:
    """Computes previews in the denoiser's stream: all threads use the same one. Events are not needed there.

    Args:
        device: The denoiser's device.
    """

    fast = True

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self) -> None:
        """Does nothing: the stream computes in the order of the launches."""

    @contextlib.contextmanager
    def after(self, events: Sequence[torch.cuda.Event | None]) -> Iterator[Elapsed]:
        """Measures the time that passes until the device has computed everything, including steps launched before."""
        elapsed, started = Elapsed(), time.perf_counter()
        try:
            yield elapsed
        finally:
            torch.accelerator.synchronize(self._device)
        elapsed.seconds = time.perf_counter() - started

    def cost(self, work: Callable[[], Any]) -> float:
        """Measures the second run, with the time to launch it."""
        with self.after(()):
            work()
        with self.after(()) as elapsed:
            work()
        return elapsed.seconds

    def lap(self) -> Lap:
        """Measures the time until the device has computed everything."""
        return _SynchronizedLap(self._device)


class CudaStream:
    """Computes previews on a CUDA stream of their own, separate from the denoiser's.

    Args:
        device: The denoiser's device.
        priority: As for `torch.cuda.Stream`: 0, that of the denoiser's stream and the lowest, or -1. Not measured yet;
            `benchmarks.gpu.side_stream` compares them.
    """

    fast = True

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]

    def record(self) -> torch.cuda.Event:
        """Records an event on the denoiser's stream."""
        return _recorded(self._device)

    @contextlib.contextmanager
    def after(self, events: Sequence[torch.cuda.Event | None]) -> Iterator[Elapsed]:
        """Makes the side stream wait on the device, not this thread; at the end this thread waits without spinning.

        The caller keeps the step's tensors until the block has ended, so the denoiser cannot reuse their memory while
        the side stream reads it.
        """
        elapsed = Elapsed()
        with torch.cuda.stream(self._stream):
            for event in events:
                if event is not None:
                    self._stream.wait_event(event)
            start = _recorded(self._device, enable_timing=True)
            try:
                yield elapsed
            finally:
                # Also after an exception: the side stream may still read tensors that the caller then gives up.
                end = _recorded(self._device, enable_timing=True, blocking=True)
                end.synchronize()
        elapsed.seconds = start.elapsed_time(end) / 1000

    def cost(self, work: Callable[[], Any]) -> float:
        """Measures a run whose kernels were all launched before the first of them starts.

        Small kernels run faster than Python launches them. Next to a denoiser the gaps are not lost: its kernels run in
        them. So the device first spins for longer than the launches take. If `work` waits for the device, the gaps
        after that count.
        """
        with self.after((self.record(),)):
            work()
        with self.after(()):
            started = time.perf_counter()
            work()
            launching = time.perf_counter() - started
        with torch.cuda.stream(self._stream), contextlib.suppress(AttributeError):
            # An internal function of torch. Without it, the time includes gaps between launches.
            torch.cuda._sleep(int(min(2 * launching, _MAX_LEAD_SECONDS) * _CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        with self.after(()) as elapsed:
            work()
        return elapsed.seconds

    def lap(self) -> Lap:
        """Measures the time on the device with events on the calling thread's stream."""
        return _EventLap(self._device)


def device_stream(device: torch.device) -> DeviceStream:
    """Returns the implementation for a device."""
    if device.type == "cpu":
        return CpuStream()
    return CudaStream(device) if device.type == "cuda" else SharedStream(device)


def call_in_order(device: torch.device, call: Callable[[], Any]) -> Any:
    """Calls code that may compute on another stream than the calling thread's: the device thread uses the default one.

    Without this, the device thread reads arguments before a side stream has computed them, and the side stream reads
    the answer before it is computed, or reuses the memory of the arguments while they are read.

    Args:
        device: The device of all tensors.
        call: Launches work on the default stream, by the time that it returns.
    """
    if device.type != "cuda":
        return call()
    own, shared = torch.cuda.current_stream(device), torch.cuda.default_stream(device)
    if own == shared:
        return call()
    # This thread waits, not the denoiser's stream.
    own.synchronize()
    answer = call()
    own.wait_stream(shared)
    return answer


def _recorded(device: torch.device, **options: bool) -> torch.cuda.Event:
    """Returns a new event on the calling thread's stream of that device."""
    event = torch.cuda.Event(**options)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event


class _WallLap:
    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = 0.0

    def stop(self) -> None:
        self._seconds = time.perf_counter() - self._started

    def device_seconds(self) -> None:
        return None

    def computing_seconds(self, threads: int) -> float:
        return self._seconds * threads


class _SynchronizedLap(_WallLap):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def stop(self) -> None:
        torch.accelerator.synchronize(self._device)
        super().stop()

    def computing_seconds(self, threads: int) -> float:
        return super().computing_seconds(1)


class _EventLap:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = self._end = _recorded(device, enable_timing=True)

    def stop(self) -> None:
        self._end = _recorded(self._device, enable_timing=True)

    def device_seconds(self) -> float:
        return self._start.elapsed_time(self._end) / 1000

    def computing_seconds(self, threads: int) -> float:
        return self.device_seconds()
