"""Keeps the launches of work on a CUDA device close to what it has computed."""

from __future__ import annotations

from collections import deque

import torch

__all__ = ["RunAhead"]


class RunAhead:
    """Bounds how far launched work runs ahead of a CUDA device: batch k+1 is launched when k-1 is computed.

    Without it cancellations and new requests would queue behind many launched steps, and progress would run ahead of
    the truth. Written with care, but not measured: there was no GPU to do it on.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._device = device
        self._launched: deque[torch.cuda.Event] = deque()

    def begin(self) -> None:
        """Chooses the device for the calling thread; a new one has the first."""
        if self.on_cuda:
            torch.cuda.set_device(self._device)

    def follow(self) -> None:
        """Notes that a batch has been launched, and waits for the one before."""
        if not self.on_cuda:
            return
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # sleeps rather than spins, and without the GIL
        event.record()
        self._launched.append(event)
        if len(self._launched) > 1:
            self._launched.popleft().synchronize()
