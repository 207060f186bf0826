"""Computes previews next to the denoiser without delaying it.

On a CPU the preview thread itself computes them. On CUDA the thread uses its own stream, which waits on the device for
the step's tensors while the denoiser's stream continues. The CUDA implementation follows PyTorch's documentation of
streams; its cost has not been measured yet.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["CpuStream", "CudaStream", "DeviceStream", "Elapsed", "device_stream"]


class Elapsed:
    """Upper bound of the time that previews took from the denoiser, in seconds; known when the block has ended."""

    seconds = 0.0


class DeviceStream(Protocol):
    """Interface of the two implementations."""

    def record(self) -> torch.cuda.Event | None:
        """Marks the point at which a step's tensors were launched. The denoiser's thread calls it; returns at once."""
        ...

    def after(self, events: Sequence[torch.cuda.Event | None]) -> contextlib.AbstractContextManager[Elapsed]:
        """Opens a block in which the preview thread can read the tensors launched before these events.

        All work of the block is finished when it ends.
        """
        ...


class CpuStream:
    """Computes previews on the CPU, in the preview thread."""

    def record(self) -> None:
        """Does nothing: on a CPU a tensor that exists is computed."""

    @contextlib.contextmanager
    def after(self, events: Sequence[torch.cuda.Event | None]) -> Iterator[Elapsed]:
        """Waits for nothing; measures the CPU time of the thread, not the time that passes."""
        elapsed, started = Elapsed(), time.thread_time()
        yield elapsed
        elapsed.seconds = time.thread_time() - started


class CudaStream:
    """Computes previews on a CUDA stream of default priority, separate from the denoiser's.

    Args:
        device: The denoiser's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def record(self) -> torch.cuda.Event:
        """Records an event on the denoiser's stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    @contextlib.contextmanager
    def after(self, events: Sequence[torch.cuda.Event | None]) -> Iterator[Elapsed]:
        """Makes the side stream wait on the device, not this thread; at the end this thread waits without spinning.

        The caller keeps the step's tensors until the block has ended, so the denoiser cannot reuse their memory while
        the side stream reads it.
        """
        elapsed = Elapsed()
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for event in events:
                if event is not None:
                    self._stream.wait_event(event)
            start.record(self._stream)
            yield elapsed
            end.record(self._stream)
        end.synchronize()
        elapsed.seconds = start.elapsed_time(end) / 1000


def device_stream(device: torch.device) -> DeviceStream:
    """Returns the implementation for a device."""
    return CudaStream(device) if device.type == "cuda" else CpuStream()
