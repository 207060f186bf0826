"""LoraRuntime: computes joined calls whose rows have different LoRAs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from calotype_server.engine.adapters.layers import RowRange
from calotype_server.engine.runtime.eager import EagerRuntime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from calotype_server.engine.adapters.loras import Loras
    from calotype_server.engine.runtime.base import DenoiserRuntime
    from calotype_server.engine.runtime.collate import Call, Collator

__all__ = ["LoraRuntime"]


class LoraRuntime:
    """Passes calls without LoRAs to another runtime, and computes all other calls eagerly; see `DenoiserRuntime`.

    An accelerator holds the weights of the plain model, so calls with LoRAs cannot use it.

    Args:
        plain: Computes calls without LoRAs.
        loras: The LoRAs of the model.
        exact: A call's answer must not depend on the other calls of its batch in a single bit; see `EagerRuntime`.
        mixes: Whether calls with different LoRAs may be joined. Otherwise all calls of a batch have the same ones.
    """

    def __init__(self, plain: DenoiserRuntime, loras: Loras, *, exact: bool, mixes: bool = True) -> None:
        self._plain = plain
        self._eager = EagerRuntime(plain.module, exact=exact)
        self._loras = loras
        self._exact = exact
        self._mixes = mixes

    @property
    def name(self) -> str:
        """The name of the other runtime."""
        return self._plain.name

    @property
    def module(self) -> Any:
        """The denoiser itself, for its attributes."""
        return self._plain.module

    @property
    def collator(self) -> Collator:
        """Joins and splits its calls."""
        return self._plain.collator

    @property
    def mixes(self) -> bool:
        """Whether calls with different LoRAs may be joined."""
        return self._mixes

    def start(self) -> None:
        """Passes the call on."""
        self._plain.start()

    def end_loading(self) -> None:
        """Passes the call on."""
        self._plain.end_loading()

    def run(self, calls: Sequence[Call], padded_rows: int) -> Any:
        """Computes calls together.

        Raises:
            RowsMismatch: The LoRAs differ, and the model has a layer whose input does not have one entry for each row.
        """
        if not any(call.loras for call in calls):
            return self._plain.run(calls, padded_rows)
        with self._loras.in_denoiser(self._ranges(calls, padded_rows), padded_rows, exact=self._exact):
            return self._eager.run(calls, padded_rows)

    def clear(self) -> None:
        """Passes the call on, and drops the stacked weights of LoRAs."""
        self._loras.free_memory()
        self._plain.clear()

    def free_memory(self) -> bool:
        """Passes the call on, and drops the stacked weights of LoRAs."""
        freed = self._loras.free_memory()
        return self._plain.free_memory() or freed

    def _ranges(self, calls: Sequence[Call], padded_rows: int) -> list[RowRange]:
        first = calls[0].loras
        own_ranges = self._exact and self._mixes  # The bits of a product depend on its number of rows.
        if not own_ranges and all(call.loras == first for call in calls):
            return [RowRange(0, padded_rows, first)]
        ranges: list[RowRange] = []
        starts = itertools.accumulate((call.rows for call in calls), initial=0)
        for start, call in zip(starts, calls, strict=False):
            if ranges and not own_ranges and ranges[-1].loras == call.loras:
                ranges[-1] = RowRange(ranges[-1].start, start + call.rows, call.loras)
            else:
                ranges.append(RowRange(start, start + call.rows, call.loras))
        return ranges
