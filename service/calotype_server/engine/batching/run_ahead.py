"""Follows the work that was launched on a device, and limits it."""

from __future__ import annotations

import functools
from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

from calotype_server.engine.machine import select_device

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DeviceEvent", "RunAhead"]


class DeviceEvent(Protocol):
    """A mark in the work that a device was given; the part of `torch.cuda.Event` that is used here."""

    def query(self) -> bool:
        """Whether the device has done all work before the mark."""
        ...

    def synchronize(self) -> None:
        """Waits until it has."""
        ...


class RunAhead:
    """Follows the work that the calling thread launches on a device.

    A CUDA device computes a call after it has returned. If nothing limits that, all steps of a generation are launched
    at once: cancellations and new requests wait behind them, and the reported progress is ahead of the real one. On
    other devices, everything counts as computed when it was launched.

    Args:
        device: The device.
        record: Marks the work launched so far; for tests.
    """

    def __init__(self, device: torch.device, record: Callable[[], DeviceEvent] | None = None) -> None:
        self._device = device
        self._record = record or (functools.partial(_record_on_cuda, device) if device.type == "cuda" else _Computed)
        self._events: deque[DeviceEvent] = deque()

    def start(self) -> None:
        """Selects the device for the calling thread; a new thread uses the first device."""
        select_device(self._device)

    def launched(self) -> None:
        """Records that a step was launched."""
        self._events.append(self._record())

    def computed(self) -> int:
        """Returns how many launched steps were computed since the last call."""
        count = 0
        while self._events and self._events[0].query():
            self._events.popleft()
            count += 1
        return count

    def limit(self) -> None:
        """Waits until at most one launched step is not computed."""
        while len(self._events) > 1:
            self._events.popleft().synchronize()


class _Computed:
    """Work of a device that computes at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """Returns at once."""


def _record_on_cuda(device: torch.device) -> DeviceEvent:
    # `blocking` makes the wait sleep instead of spin, without the GIL.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
