"""FallbackRuntime: computes the denoiser with an accelerator, until the accelerator fails."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import structlog

from calotype_server.engine.memory import is_device_failure, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.collate import Call, Collator

__all__ = ["FallbackRuntime"]

_log = structlog.get_logger(__name__)


class FallbackRuntime:
    """Calls an accelerated runtime, and plain calls for good after an error that plain calls do not have.

    An error of the calls themselves, exhausted memory, and a failure of the device are raised: they say nothing about
    the accelerator. See `DenoiserRuntime`.

    Args:
        accelerated: The runtime to use.
        eager: Plain calls of the same module.
        on_fallback: Called by the device thread after the error. It must not block.
    """

    def __init__(
        self, accelerated: DenoiserRuntime, eager: DenoiserRuntime, on_fallback: Callable[[], None] = lambda: None
    ) -> None:
        self._accelerated = accelerated
        self._active = accelerated
        self._eager = eager
        self._on_fallback = on_fallback

    @property
    def name(self) -> str:
        """Name of the runtime that computes the next call."""
        return self._active.name

    @property
    def failure(self) -> str:
        """Why plain calls are used, in one sentence; empty while the accelerator works."""
        return "" if self._active is self._accelerated else f"The accelerator {self._accelerated.name} failed."

    @property
    def module(self) -> Any:
        """The denoiser itself, for its attributes."""
        return self._eager.module

    @property
    def collator(self) -> Collator:
        """Joins and splits its calls."""
        return self._eager.collator

    def start(self) -> None:
        """Prepares the calling thread."""
        self._eager.start()
        self._accelerated.start()

    def end_loading(self) -> None:
        """Passes the call on."""
        self._accelerated.end_loading()

    def run(self, calls: Sequence[Call], padded_rows: int) -> Any:
        """Computes calls of one signature together.

        Raises:
            Exception: The calls fail without the accelerator too, memory ran out, or the device failed.
        """
        if self._active is self._eager:
            return self._eager.run(calls, padded_rows)
        try:
            return self._accelerated.run(calls, padded_rows)
        except Exception as error:
            if is_out_of_memory(error) or is_device_failure(error):
                raise
            failed = error
        # The traceback's frames keep tensors alive, and plain calls may need their memory.
        traceback.clear_frames(failed.__traceback__)
        answer = self._eager.run(calls, padded_rows)
        self._fall_back(failed)
        return answer

    def clear(self) -> None:
        """Passes the call on. If the accelerator fails, plain calls are used for good."""
        try:
            self._accelerated.clear()
        except Exception as error:
            self._note_failed_cleaning(error)

    def free_memory(self) -> bool:
        """Frees what the accelerator can do without. If the accelerator fails, plain calls are used for good."""
        try:
            return self._accelerated.free_memory()
        except Exception as error:
            self._note_failed_cleaning(error)
            return False

    def _fall_back(self, failed: Exception) -> None:
        if self._active is self._eager:
            return
        _log.warning("the accelerator failed and is not used any more", accelerator=self.name, exc_info=failed)
        self._active = self._eager
        self.clear()
        self._on_fallback()

    def _note_failed_cleaning(self, error: Exception) -> None:
        if is_device_failure(error):
            raise error
        self._fall_back(error)
