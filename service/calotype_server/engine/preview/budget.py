"""Chooses the previews that a generation can afford, from measured times of steps, decoders and the encoder."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from calotype_server.engine.preview.costs import CoreCosts
from calotype_server.types import PreviewMethod

if TYPE_CHECKING:
    from collections.abc import Iterable

    from calotype_server.engine.preview.costs import PreviewCosts

__all__ = ["Choice", "PreviewBudget"]

_NEWEST_WEIGHT = 0.2
"""Weight of the newest measurement in the moving average of steps."""

_BEST_FIRST = (PreviewMethod.FULL_VAE, PreviewMethod.TINY_VAE, PreviewMethod.HEAD)

_STRIDE_TO_TAKE = 2
"""A better decoder is chosen if it can show every second step: a sharper image does not make up for rare previews."""

_STRIDE_TO_KEEP = 4
"""It is kept up to this stride, so that a generation's previews do not alternate between two decoders."""


class Choice(NamedTuple):
    """The decoder to use, and the smallest number of steps between two previews."""

    method: PreviewMethod
    stride: int


class PreviewBudget:
    """Limits previews to a share of the denoiser's time.

    Several threads call this; losing a measurement to a race does not matter.

    Args:
        share: Largest share of a step's time that previews may cost on average, above 0, at most 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._step: float | None = None
        self._costs: PreviewCosts = CoreCosts()

    def charge(self, costs: PreviewCosts) -> None:
        """Sets what previews cost on the device of the model. Call it before all measurements.

        Args:
            costs: The costs; by default, those of a CPU whose cores are all used by the denoiser.
        """
        self._costs = costs

    def observe_step(self, seconds: float, pixel_count: int) -> None:
        """Records the denoiser's time for a step of an image of that size; concurrent generations share it equally."""
        self._step = _mix(self._step, seconds / pixel_count)

    def observe_decode(self, method: PreviewMethod, seconds: float, pixel_count: int) -> None:
        """Records the computing time of a decoder for a preview of an image of that size."""
        self._costs.observe_decode(method, seconds, pixel_count)

    def observe_encode(self, seconds: float) -> None:
        """Records the CPU time of the encoder for a preview."""
        self._costs.observe_encode(seconds)

    def cost(self, method: PreviewMethod, pixel_count: int) -> float | None:
        """Returns the seconds that the denoiser loses to one preview, or None if the method is not measured yet."""
        return self._costs.of(method, pixel_count)

    def stride(self, method: PreviewMethod, pixel_count: int) -> int | None:
        """Returns the smallest number of steps between previews within the budget, or None if not measured yet."""
        cost = self.cost(method, pixel_count)
        if cost is None or not self._step:
            return None
        return max(1, math.ceil(cost / (self._share * self._step * pixel_count)))

    def choose(
        self, methods: Iterable[PreviewMethod], pixel_count: int, current: PreviewMethod | None = None
    ) -> Choice | None:
        """Returns the best method that is fast enough, or else the cheapest with the stride that it needs.

        Args:
            methods: The available methods.
            pixel_count: Of the final image.
            current: The method of the generation's previous preview.
        """
        available = [method for method in _BEST_FIRST if method in methods]
        strides = {method: self.stride(method, pixel_count) for method in available}
        for method, stride in strides.items():
            if stride is not None and stride <= (_STRIDE_TO_KEEP if method is current else _STRIDE_TO_TAKE):
                return Choice(method, stride)
        if not available:
            return None
        # The last in the list is always the cheapest. Until it is measured, it is shown at every step.
        return Choice(available[-1], strides[available[-1]] or 1)


def _mix(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST_WEIGHT * (new - old)
