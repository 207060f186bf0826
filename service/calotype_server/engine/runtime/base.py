"""The interface between the device thread and the ways to compute the denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.runtime.collate import Call, Collator

__all__ = ["DenoiserRuntime"]


class DenoiserRuntime(Protocol):
    """Computes joined calls of one denoiser. After `start`, only the device thread calls `run` and `free_memory`."""

    @property
    def name(self) -> str:
        """The value of `--accelerate` that selects it; "none" for plain calls."""
        ...

    @property
    def module(self) -> Any:
        """The denoiser itself, for its attributes."""
        ...

    @property
    def collator(self) -> Collator:
        """Joins and splits its calls."""
        ...

    def start(self) -> None:
        """Prepares the calling thread, which will make all other calls."""
        ...

    def end_loading(self) -> None:
        """Called when the calls that prepare the server have run. Later preparations would delay requests."""
        ...

    def run(self, calls: Sequence[Call], padded_rows: int) -> Any:
        """Computes calls of one signature together.

        Args:
            calls: The calls, in the order of their rows.
            padded_rows: Rows to compute; at least the rows of the calls.

        Returns:
            The output for at least the rows of the calls; no later call overwrites it. On a GPU it may still be
            computing.
        """
        ...

    def clear(self) -> None:
        """Drops everything that earlier calls prepared, such as those that measured it."""
        ...

    def free_memory(self) -> bool:
        """Frees device memory that only serves speed. Returns whether there was any."""
        ...
