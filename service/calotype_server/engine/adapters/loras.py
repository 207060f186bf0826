"""The LoRAs of a loaded model, and how they are applied to its denoiser and to its text encoders."""

from __future__ import annotations

import contextlib
import contextvars
from typing import TYPE_CHECKING, Any

from calotype_server.engine.adapters.layers import AdaptedLayer, LayerDelta, RowRange, applied

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from calotype_server.types import Lora

__all__ = ["Loras"]

_EVERY_ROW = 1
"""Number of rows for calls whose real number does not matter, because all rows have the same LoRAs."""

_encoding: contextvars.ContextVar[tuple[Lora, ...]] = contextvars.ContextVar("encoding", default=())
"""LoRAs of the prompt that the current thread encodes."""


class Loras:
    """LoRAs that requests choose by name.

    One thread at a time computes the denoiser, so its layers change for each call. Text encoders run in the threads of
    all requests at the same time: each of their layers asks for the choice of its own thread.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._denoiser: dict[str, AdaptedLayer] = {}
        self._encoders: dict[tuple[str, str], AdaptedLayer] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all LoRAs, sorted."""
        return tuple(sorted(self._names))

    def add_name(self, name: str) -> None:
        """Adds a LoRA, whose layers follow."""
        self._names.append(name)

    def add_to_denoiser(self, path: str, layer: torch.nn.Module, name: str, delta: LayerDelta) -> None:
        """Adds the change of a LoRA to the layer of the denoiser at `path`."""
        self._denoiser.setdefault(path, AdaptedLayer(layer, {})).add(name, delta)

    def add_to_encoder(self, component: str, path: str, layer: torch.nn.Module, name: str, delta: LayerDelta) -> None:
        """Adds the change of a LoRA to the layer of a text encoder at `path`."""
        key = component, path
        if key not in self._encoders:
            self._encoders[key] = adapted = AdaptedLayer(layer, {})
            layer.register_forward_hook(_encoder_hook(adapted))
        self._encoders[key].add(name, delta)

    def in_denoiser(
        self, ranges: Sequence[RowRange], rows: int, *, exact: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        """Applies LoRAs to the rows of the denoiser's calls during a block; see `layers.applied`."""
        return applied(list(self._denoiser.values()), ranges, rows, exact=exact)

    def in_whole_denoiser(self, loras: tuple[Lora, ...]) -> contextlib.AbstractContextManager[None]:
        """Applies LoRAs to all rows of all calls of the denoiser during a block."""
        return self.in_denoiser([RowRange(0, _EVERY_ROW, loras)] if loras else [], _EVERY_ROW)

    def free_memory(self) -> bool:
        """Frees memory that only makes calls of the denoiser faster. Returns whether there was any."""
        return sum([each.free_memory() for each in self._denoiser.values()]) > 0

    @contextlib.contextmanager
    def in_encoders(self, loras: tuple[Lora, ...]) -> Iterator[None]:
        """Applies LoRAs to prompts that the calling thread encodes during a block."""
        token = _encoding.set(loras)
        try:
            yield
        finally:
            _encoding.reset(token)


def _encoder_hook(adapted: AdaptedLayer) -> Any:
    def add_chosen(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if chosen := _encoding.get():
            adapted.add_to(output, inputs[0], chosen)

    return add_chosen
