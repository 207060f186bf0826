"""Where previews are computed: beside the denoiser, never in its way.

On a CPU that is simply the preview thread. On CUDA the thread uses a stream of its own, which waits on the device for
the step's tensors and lets the denoiser's stream run on. The CUDA lane was written from PyTorch's documentation of
streams and has not been measured yet.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["CpuLane", "CudaLane", "DeviceStream", "Spent", "lane_for"]


class Spent:
    """Seconds that previews took from the denoiser at most; known when the block has ended."""

    seconds = 0.0


class DeviceStream(Protocol):
    """A place to compute previews in."""

    def mark(self) -> torch.cuda.Event | None:
        """Called by the denoiser's thread when a step's tensors have been issued; returns at once."""
        ...

    def after(self, marks: Sequence[torch.cuda.Event | None]) -> contextlib.AbstractContextManager[Spent]:
        """Called by the preview thread: what it does within sees the marked tensors, and is finished at the end."""
        ...


class CpuLane:
    """The preview thread itself."""

    def mark(self) -> None:
        """Nothing to wait for: on a CPU a tensor that exists is computed."""

    @contextlib.contextmanager
    def after(self, marks: Sequence[torch.cuda.Event | None]) -> Iterator[Spent]:
        """Nothing to wait for; counts the time of the processor, not the time that passes."""
        spent, begun = Spent(), time.thread_time()
        yield spent
        spent.seconds = time.thread_time() - begun


class CudaLane:
    """A side stream of the default priority.

    Args:
        device: The denoiser's.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.DenoiserSession(device)  # type: ignore[no-untyped-call]

    def mark(self) -> torch.cuda.Event:
        """Records an event on the denoiser's stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._stream.device))
        return event

    @contextlib.contextmanager
    def after(self, marks: Sequence[torch.cuda.Event | None]) -> Iterator[Spent]:
        """Makes the side stream wait on the device, not this thread; at the end this thread waits without spinning.

        The caller keeps the step's tensors until the block has ended, so their memory is not given to the denoiser
        while the side stream reads it.
        """
        spent = Spent()
        begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        done = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            for mark in marks:
                if mark is not None:
                    self._stream.wait_event(mark)
            begun.record(self._stream)
            yield spent
            done.record(self._stream)
        done.synchronize()
        spent.seconds = begun.elapsed_time(done) / 1000


def lane_for(device: torch.device) -> DeviceStream:
    """Returns the lane that suits a device."""
    return CudaLane(device) if device.type == "cuda" else CpuLane()
