"""Limits how far launched work runs ahead of a CUDA device."""

from __future__ import annotations

from collections import deque

import torch

__all__ = ["RunAhead"]


class RunAhead:
    """Launches batch k+1 on a CUDA device only when batch k-1 is computed.

    Without it, cancellations and new requests would queue behind many launched steps, and the reported progress would
    be ahead of the real one. Not measured on a GPU yet.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._device = device
        self._launched: deque[torch.cuda.Event] = deque()

    def start(self) -> None:
        """Selects the device for the calling thread; a new thread uses the first device."""
        if self.on_cuda:
            torch.cuda.set_device(self._device)

    def follow(self) -> None:
        """Records that a batch was launched, and waits for the batch before it."""
        if not self.on_cuda:
            return
        # `blocking` makes the wait sleep instead of spin, without the GIL.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        self._launched.append(event)
        if len(self._launched) > 1:
            self._launched.popleft().synchronize()
