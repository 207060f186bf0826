"""EagerRuntime: calls the denoiser as its pipeline would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calotype_server.engine.runtime.collate import Collator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.runtime.collate import Call

__all__ = ["EagerRuntime"]


class EagerRuntime:
    """Calls the denoiser directly; see `DenoiserRuntime`.

    Args:
        module: The denoiser.
        exact: Join only rows that need no padding; see `Collator`.
    """

    name = "none"

    def __init__(self, module: Any, *, exact: bool = False) -> None:
        self.module = module
        self.collator = Collator(module, exact=exact)

    def start(self) -> None:
        """Does nothing."""

    def end_loading(self) -> None:
        """Does nothing."""

    def run(self, calls: Sequence[Call], padded_rows: int) -> Any:
        """Joins the calls, and calls the denoiser once."""
        args, kwargs = self.collator.join(calls, padded_rows)
        return self.module(*args, **kwargs)

    def clear(self) -> None:
        """Has prepared nothing."""

    def free_memory(self) -> bool:
        """Has no memory to free."""
        return False
