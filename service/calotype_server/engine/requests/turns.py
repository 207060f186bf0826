"""Lets threads use modules whose weights move between devices one after another.

Text encoders run in the threads of their requests, the VAE also in the preview thread. If hooks moved the same weights
in two threads at once, one thread would compute with weights that the other has just moved away. With `--offload
model`, only one module is on the device, so that one lock guards all of them.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from accelerate.hooks import CpuOffload

from calotype_server.engine.machine import device_of

__all__ = ["Turns"]


class Turns:
    """A lock that several modules share. A module that takes its turn sends the one before it back to the host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Any = None

    def of(self, module: Any) -> _Turn:
        """Returns the turn of a module: a block in which no other module runs."""
        return _Turn(self, module)

    def begin(self, module: Any) -> None:
        """Waits for the turn of a module, and makes room for it."""
        self._lock.acquire()
        before, self._last = self._last, module
        try:
            if before is not None and before is not module:
                _send_back(before)
        except BaseException:
            self._lock.release()
            raise

    def end(self) -> None:
        """Ends the turn. The weights stay on the device until another module needs it."""
        self._lock.release()


class _Turn:
    """One module's use of the shared lock, for `with`; not reentrant."""

    def __init__(self, turns: Turns, module: Any) -> None:
        self._turns = turns
        self._module = module

    def __enter__(self) -> None:
        self._turns.begin(self._module)

    def __exit__(self, *error: object) -> None:
        self._turns.end()


def _send_back(module: Any) -> None:
    """Moves a module's weights to the host if accelerate's hook has moved them to the device."""
    hook = getattr(module, "_hf_hook", None)
    if not isinstance(hook, CpuOffload):
        return  # Hooks of diffusers do so after each layer.
    device = device_of(module)
    if device.type != "cpu":
        # The module may still compute on the stream of another thread.
        torch.accelerator.synchronize(device)
    hook.init_hook(module)
