"""StepCache: decides which steps of one request are computed, and forecasts the other ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from calotype_server.engine.step_cache.noise_space import from_noise, to_noise
from calotype_server.types import forecast_steps

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from calotype_server.engine.schedulers.predicted_x0 import NoiseLevel

__all__ = ["StepCache"]


@dataclass(frozen=True, slots=True)
class _Computed:
    """A computed step: its number, and the noise that the model predicted, after guidance, in float32."""

    step: int
    noise: torch.Tensor


class StepCache:
    """The predicted noise of one request at its last two computed steps. Not thread-safe.

    It sits at two places. Instead of the denoiser, the pipeline calls `answer`, which skips the call where the step can
    be forecast. Then the pipeline combines the answers for guidance, and the output goes through `settle` on its way to
    the scheduler, where the forecast replaces it. A forecast after guidance needs one tensor, regardless of how many
    calls or rows guidance takes.

    It never waits for a CUDA device.
    """

    def __init__(self) -> None:
        self._to_forecast: frozenset[int] = frozenset()
        self._step = self._computed_steps = 0
        self._last: list[_Computed] = []
        self._calls: list[tuple[Hashable, Any]] = []
        """Kind and answer of each call of this step."""
        self._last_calls: list[tuple[Hashable, Any]] = []
        """The same of the last computed step."""
        self._skipped = False

    @property
    def computed_steps(self) -> int:
        """Number of steps so far that were computed."""
        return self._computed_steps

    @property
    def skips_next(self) -> bool:
        """Whether the next call will probably be skipped. It assumes as many calls in a step as in the one before."""
        following = self._step + (len(self._calls) >= len(self._last_calls))
        return following in self._to_forecast and len(self._last) == 2

    def start(self, total: int) -> None:
        """Starts with the first of `total` steps, and forgets all others."""
        self._to_forecast = forecast_steps(total)
        self._step = self._computed_steps = 0
        self._last, self._calls, self._last_calls, self._skipped = [], [], [], False

    def answer(self, kind: Hashable, compute: Callable[[], Any]) -> Any:
        """Returns the answer to a call of the denoiser, or an old answer if the step can be forecast.

        Args:
            kind: Calls with other rows, shapes or conditions have another kind. The request's calls in the same place
                of the last two computed steps must have been of the same kind, or else the call is computed.
            compute: Computes the answer.
        """
        place = len(self._calls)
        known = self._last_calls[place] if place < len(self._last_calls) else None
        # A step whose first call was computed is computed as a whole.
        possible = self._step in self._to_forecast and len(self._last) == 2 and (self._skipped or place == 0)
        if possible and known is not None and known[0] == kind:
            self._skipped = True
            answer = known[1]
        else:
            answer = compute()
        self._calls.append((kind, answer))
        return answer

    def settle(self, level: NoiseLevel | None, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Ends a step: returns the model's output for the scheduler, as it is or forecast.

        Args:
            level: Noise level of the step.
            sample: Noisy latents before the step.
            output: The model's output after guidance. It is meaningless if a call was skipped.

        Returns:
            `output`, or a forecast of the same shape and dtype.
        """
        if self._skipped:
            noise = self._forecast_noise()
            settled = from_noise(level, sample.float(), noise).to(output.dtype)
        else:
            self._keep(to_noise(level, sample.float(), output.float()))
            settled = output
        self._calls, self._skipped = [], False
        self._step += 1
        return settled

    def _forecast_noise(self) -> torch.Tensor:
        """Returns the predicted noise on the straight line through the last two, over the number of the step.

        A line over the noise level was measured to be no better, a curve of second order worse.
        """
        older, newer = self._last
        return torch.lerp(older.noise, newer.noise, (self._step - older.step) / (newer.step - older.step))

    def _keep(self, noise: torch.Tensor) -> None:
        if [kind for kind, _ in self._calls] != [kind for kind, _ in self._last_calls]:
            self._last = []
        # A copy: a noise that is the output itself may be a view of the answer to a joined call.
        self._last = [*self._last[-1:], _Computed(self._step, noise.clone())]
        self._last_calls = self._calls
        self._computed_steps += 1
