"""A stand-in for a CUDA device, which computes when a test says so."""

from __future__ import annotations

import threading

import torch

from calotype_server.engine.batching.run_ahead import RunAhead
from support.runs import PATIENCE

__all__ = ["LaggingDevice"]


class _Event:
    """A stand-in for a CUDA event."""

    def __init__(self):
        self.computed = threading.Event()
        self.waiting = threading.Event()

    def query(self):
        return self.computed.is_set()

    def synchronize(self):
        self.waiting.set()
        assert self.computed.wait(PATIENCE)


class LaggingDevice:
    """Stands for a CUDA device: a test decides when it has computed a batch."""

    def __init__(self):
        self.events = []
        self._changed = threading.Condition()

    def record(self):
        """Records a launch."""
        with self._changed:
            self.events.append(_Event())
            self._changed.notify_all()
            return self.events[-1]

    def wait_for_launch(self, number):
        """Waits until a batch, counted from 0, is launched."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.events) > number, PATIENCE)

    def compute(self, number):
        """Computes a batch as soon as it is launched."""
        self.wait_for_launch(number)
        self.events[number].computed.set()

    def run_ahead(self, *_):
        """Returns a `RunAhead` that follows this device."""
        return RunAhead(torch.device("cpu"), self.record)
