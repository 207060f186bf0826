"""Which steps of a request are computed, and the forecast at the other ones."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calotype_server.engine.schedulers.predicted_x0 import NoiseLevel
from calotype_server.engine.step_cache.cache import StepCache
from calotype_server.types import FAST_MIN_STEPS, forecast_steps

SAMPLE = torch.zeros(1, 4)


class Request:
    """A pipeline of `total` steps whose denoiser answers with `line(step)` in every element.

    Args:
        total: Number of steps.
        kinds: Returns the kinds of the calls of a step.
        line: The denoiser's answer at a step.
        dtype: Number format of the answers.
    """

    def __init__(self, total, kinds=lambda _: "a", line=lambda step: 3.0 * step + 1, dtype=torch.float32):
        self.cache = StepCache()
        self.calls = []
        """Step and kind of each computed call."""
        self.cache.start(total)
        self.announced = []
        """Whether the cache expected to skip the next call, after each call."""
        self.outputs = []
        for step in range(total):
            for kind in kinds(step):
                answer = self.cache.answer(kind, functools.partial(self._compute, step, kind, line, dtype))
                self.announced.append(self.cache.skips_next)
            self.outputs.append(self.cache.settle(None, SAMPLE.to(dtype), answer[0] * 1))

    def _compute(self, step, kind, line, dtype):
        self.calls.append((step, kind))
        return (torch.full((1, 4), line(step), dtype=dtype),)

    @property
    def computed(self):
        """The computed steps."""
        return sorted({step for step, _ in self.calls})


@given(st.integers(0, 200))
def test_the_first_and_the_last_steps_are_computed(total):
    """At most two steps in a row are forecast, never the first fifth, the last, or any of a short run."""
    steps = forecast_steps(total)
    assert all(0.2 * total <= step < total - max(1, 0.06 * total) for step in steps)
    assert all(not {step, step + 1, step + 2} <= steps for step in steps)
    assert bool(steps) == (total >= FAST_MIN_STEPS)


@pytest.mark.parametrize(("total", "computed"), [(15, 15), (16, 10), (20, 13), (28, 14), (50, 25)])
def test_numbers_of_computed_steps(total, computed):
    """The documented numbers of steps that are computed."""
    assert total - len(forecast_steps(total)) == computed
    assert Request(total).cache.computed_steps == computed


def test_a_forecast_is_a_straight_line():
    """Answers on a line are forecast exactly, and only the steps of the mask are."""
    request = Request(28)
    assert set(range(28)) - set(request.computed) == forecast_steps(28)
    for step, output in enumerate(request.outputs):
        assert torch.allclose(output, torch.full((1, 4), 3.0 * step + 1))


def test_a_forecast_keeps_the_dtype():
    """A bfloat16 model gets forecasts in bfloat16, computed in float32."""
    request = Request(28, line=lambda step: 1 + step / 64, dtype=torch.bfloat16)
    assert {output.dtype for output in request.outputs} == {torch.bfloat16}
    assert all(torch.equal(o, torch.full((1, 4), 1 + s / 64).bfloat16()) for s, o in enumerate(request.outputs))


def test_a_computed_output_is_passed_on_untouched():
    """The scheduler receives the same object as without a cache at a computed step."""
    cache = StepCache()
    cache.start(28)
    output = torch.ones(1, 4)
    assert cache.settle(None, SAMPLE, output) is output


def test_two_calls_per_step_are_skipped_together():
    """With guidance in two calls per step, both calls of a step are computed or both are skipped."""
    request = Request(28, kinds=lambda _: "pn")
    assert request.calls == [(step, kind) for step in range(28) if step not in forecast_steps(28) for kind in "pn"]
    assert request.cache.computed_steps == 14


@pytest.mark.parametrize("kinds", ["a", "pn"])
def test_a_skipped_call_is_announced(kinds):
    """After each call, the cache knows whether the next call will be skipped."""
    request = Request(28, kinds=lambda _: kinds)
    skipped = [step in forecast_steps(28) for step in range(28) for _ in kinds]
    assert request.announced[:-1] == skipped[1:]


@pytest.mark.parametrize("change", range(5, 27))
def test_a_change_of_guidance_starts_over(change):
    """After guidance ends, the next two answers are computed, because earlier ones have another meaning."""
    request = Request(28, kinds=lambda step: "pn" if step < change else "p")
    first = min(step for step in range(change, 28) if step not in forecast_steps(28))
    assert set(range(first, min(first + 2, 28))) <= set(request.computed)
    assert request.cache.computed_steps == len(request.computed) <= 16


def test_a_change_of_shape_is_computed_at_once():
    """A call of another kind than before is computed although the step is one to forecast."""
    step = min(forecast_steps(28))
    request = Request(28, kinds=lambda number: "a" if number < step else "b")
    assert {step, step + 1} <= set(request.computed)


def test_a_second_start_forgets_the_first():
    """A pipeline that sets its timesteps twice starts without answers."""
    request = Request(28)
    request.cache.start(28)
    assert (request.cache.computed_steps, request.cache.skips_next) == (0, False)


def test_a_forecast_does_not_change_with_later_writes():
    """A pipeline that overwrites the output of a step, or a view of a joined answer, does not change a forecast."""
    cache = StepCache()
    cache.start(28)
    outputs = []
    for step in range(28):
        answer = cache.answer("a", functools.partial(torch.full, (1, 4), float(step)))
        outputs.append(cache.settle(None, SAMPLE, answer).clone())
        answer.zero_()
    assert [float(output[0, 0]) for output in outputs] == pytest.approx(list(range(28)))


def test_forecasts_are_made_of_the_noise():
    """With v-prediction the forecast is exact where the predicted noise lies on a line, at any sample and level."""
    cache = StepCache()
    cache.start(28)
    generator = torch.Generator().manual_seed(0)
    for step in range(28):
        alpha = (step + 1) / 30
        level = NoiseLevel("v_prediction", alpha, (1 - alpha**2) ** 0.5)
        sample, noise = torch.randn(1, 4, generator=generator), torch.full((1, 4), 0.1 * step)
        exact = (noise - level.sigma * sample) / alpha
        answer = cache.answer("a", functools.partial(torch.clone, exact))
        assert torch.allclose(cache.settle(level, sample, answer), exact, atol=1e-4)
    assert cache.computed_steps == 14
