"""Costs of previews for the denoiser, for each kind of device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from calotype_server.types import PreviewMethod

__all__ = ["CoreCosts", "DeviceCosts", "PreviewCosts"]

_RISING_WEIGHT, _FALLING_WEIGHT = 0.05, 0.5


class PreviewCosts(Protocol):
    """Turns measurements into the time that the denoiser loses. `PreviewBudget` calls it."""

    def observe_decode(self, method: PreviewMethod, seconds: float, pixel_count: int) -> None:
        """Records the computing time of a decoder for a preview of an image of that size."""
        ...

    def observe_encode(self, seconds: float) -> None:
        """Records the CPU time of the encoder for a preview."""
        ...

    def of(self, method: PreviewMethod, pixel_count: int) -> float | None:
        """Returns the seconds that the denoiser loses to one preview, or None if the method is not measured yet."""
        ...


class CoreCosts:
    """Costs on a CPU: previews and their encoder use cores that the denoiser also uses.

    Args:
        contention: Share of the previews' work that slows the denoiser down, from 0 to 1; 1 means that both use the
            same cores.
    """

    def __init__(self, contention: float = 1.0) -> None:
        self._contention = contention
        self._encode = 0.0
        self._decode: dict[PreviewMethod, float] = {}

    def observe_decode(self, method: PreviewMethod, seconds: float, pixel_count: int) -> None:
        """Adds the measurement to a moving average."""
        self._decode[method] = _mix(self._decode.get(method), seconds / pixel_count)

    def observe_encode(self, seconds: float) -> None:
        """Adds the measurement to a moving average."""
        self._encode = _mix(self._encode or None, seconds)

    def of(self, method: PreviewMethod, pixel_count: int) -> float | None:
        """Returns the share of the computing time of decoder and encoder."""
        if method not in self._decode:
            return None
        return (self._decode[method] * pixel_count + self._encode) * self._contention


class DeviceCosts:
    """Costs on a GPU: the denoiser loses the time that the device spends on the decoder's kernels, and nothing else.

    A measurement next to a running denoiser is too long: the decoder's kernels share the device, and they wait for
    Python's lock in between. So only the shortest one counts; `DeviceStream.cost` measures without that when the model
    loads. The encoder uses the CPU.
    """

    def __init__(self) -> None:
        self._decode: dict[PreviewMethod, float] = {}

    def observe_decode(self, method: PreviewMethod, seconds: float, pixel_count: int) -> None:
        """Keeps the shortest time per pixel."""
        self._decode[method] = min(self._decode.get(method, seconds / pixel_count), seconds / pixel_count)

    def observe_encode(self, seconds: float) -> None:
        """Ignores the encoder."""

    def of(self, method: PreviewMethod, pixel_count: int) -> float | None:
        """Returns the time of the decoder."""
        return self._decode[method] * pixel_count if method in self._decode else None


def _mix(old: float | None, new: float) -> float:
    """A moving average that falls fast and rises slowly, because interference can only make a measurement longer."""
    if old is None:
        return new
    return old + (_RISING_WEIGHT if new > old else _FALLING_WEIGHT) * (new - old)
