"""Which previews a generation can afford, from what steps, decoders and the encoder were measured to take."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from calotype_server.types import PreviewMethod

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Choice", "PreviewBudget"]

_NEWEST_WEIGHT = 0.2
"""Weight of the newest measurement in the moving averages."""

_RISING_WEIGHT, _FALLING_WEIGHT = 0.05, 0.5

_BEST_FIRST = (PreviewMethod.FULL_VAE, PreviewMethod.TINY_VAE, PreviewMethod.HEAD)

_STRIDE_TO_TAKE = 2
"""A better decoder is taken when it can show every second step: a sharper picture is not worth a slide show."""

_STRIDE_TO_KEEP = 4
"""It is kept a little longer than that, so that a generation's look does not flicker between two decoders."""


class Choice(NamedTuple):
    """What to draw with, and the least number of steps between two previews."""

    method: PreviewMethod
    stride: int


class PreviewBudget:
    """Keeps previews to a share of the denoiser's time.

    A preview costs the seconds that its decoder and its encoder compute, times the share of them that the denoiser
    feels. Called from several threads: a measurement lost to a race is of no consequence.

    Args:
        share: Of the time of a step that previews may cost on average, above 0, at most 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.contention = 1.0
        """Share of the previews' work that the denoiser feels, 0 to 1: all of it where both use the same cores."""
        self._step: float | None = None
        self._encode = 0.0
        self._decode: dict[PreviewMethod, float] = {}

    def observe_step(self, seconds: float, pixel_count: int) -> None:
        """Learns the denoiser's time for a step of a picture of that size; of several at once, each has its part."""
        self._step = _mix(self._step, seconds / pixel_count)

    def observe_decode(self, method: PreviewMethod, seconds: float, pixel_count: int) -> None:
        """Learns how long a decoder computed a preview of a picture of that size."""
        self._decode[method] = _mix_cost(self._decode.get(method), seconds / pixel_count)

    def observe_encode(self, seconds: float) -> None:
        """Learns how long the encoder computed a preview."""
        self._encode = _mix_cost(self._encode or None, seconds)

    def cost(self, method: PreviewMethod, pixel_count: int) -> float | None:
        """Seconds that the denoiser loses to one preview; None when that method was not measured yet."""
        if method not in self._decode:
            return None
        return (self._decode[method] * pixel_count + self._encode) * self.contention

    def stride(self, method: PreviewMethod, pixel_count: int) -> int | None:
        """Least number of steps between previews that stays within the budget; None when something is not measured."""
        cost = self.cost(method, pixel_count)
        if cost is None or not self._step:
            return None
        return max(1, math.ceil(cost / (self._share * self._step * pixel_count)))

    def choose(
        self, methods: Iterable[PreviewMethod], pixel_count: int, current: PreviewMethod | None = None
    ) -> Choice | None:
        """Returns the best method that is quick enough, or else the cheapest with the stride that it needs.

        Args:
            methods: To choose from.
            pixel_count: Of the final image.
            current: What the generation was drawn with so far.
        """
        available = [method for method in _BEST_FIRST if method in methods]
        strides = {method: self.stride(method, pixel_count) for method in available}
        for method, stride in strides.items():
            if stride is not None and stride <= (_STRIDE_TO_KEEP if method is current else _STRIDE_TO_TAKE):
                return Choice(method, stride)
        if not available:
            return None
        # Last in the list is the cheapest by nature; before anything was measured it is shown at every step.
        return Choice(available[-1], strides[available[-1]] or 1)


def _mix(old: float | None, new: float) -> float:
    return new if old is None else old + _NEWEST_WEIGHT * (new - old)


def _mix_cost(old: float | None, new: float) -> float:
    """A moving average that falls quickly and rises slowly: what disturbs a measurement can only make it longer."""
    if old is None:
        return new
    return old + (_RISING_WEIGHT if new > old else _FALLING_WEIGHT) * (new - old)
