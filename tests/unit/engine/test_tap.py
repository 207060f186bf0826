"""StepTap observes without changing anything, and a request's view does not change the shared pipeline."""

import contextlib
import copy
import inspect

import diffusers
import pytest
import torch

from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.tap import StepTap, Stopped
from support.engine import tiny
from support.engine.tiny_inputs import arguments


class Recorder:
    """Records the tap's callbacks, and asks it to stop after a number of steps."""

    def __init__(self, stop_after=None):
        self.totals = []
        self.steps = []
        self.stop_after = stop_after

    def tap(self, scheduler):
        return StepTap(
            scheduler,
            on_start=self.totals.append,
            on_step=self.steps.append,
            should_stop=lambda: self.stop_after is not None and len(self.steps) >= self.stop_after,
        )


@pytest.fixture(scope="module")
def untouched():
    """The result of a pipeline without a tap."""
    results = {}

    def result(family):
        if family not in results:
            results[family] = tiny.build(family)(**arguments(family))[0]
        return results[family]

    return result


def tapped_view(family, recorder):
    """Returns a view of the shared pipeline with a tapped scheduler."""
    pipeline = tiny.shared(family)
    scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
    recorder.tap(scheduler)
    return request_view(pipeline, scheduler)


def state(scheduler):
    """Returns the state of a scheduler in a form that can be compared."""
    return {
        name: value.tolist() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
        for name, value in vars(scheduler).items()
    }


@tiny.every_family
def test_result_is_bit_identical(family, untouched):
    """A tapped pipeline computes the same bits as one without a tap."""
    result = tapped_view(family, Recorder())(**arguments(family))[0]
    assert torch.isfinite(result).all()
    assert torch.equal(result, untouched(family))


@tiny.every_family
def test_each_step_is_reported_once(family):
    """`on_start` receives the number of timesteps, and as many steps follow, numbered from 1."""
    recorder = Recorder()
    view = tapped_view(family, recorder)
    view(**arguments(family))
    total = len(view.scheduler.timesteps)
    if family == "sana_sprint":
        # SCM lists the noise-free end among its timesteps; no step is taken there.
        total -= 1
    assert total >= 2
    assert recorder.totals == [total]
    assert [(step.number, step.total) for step in recorder.steps] == [(n + 1, total) for n in range(total)]


@pytest.mark.parametrize(
    ("name", "total"),
    [("DDIMScheduler", 4), ("HeunDiscreteScheduler", 7), ("KDPM2DiscreteScheduler", 7), ("EulerDiscreteScheduler", 4)],
)
def test_total_counts_evaluations(name, total, sd15):
    """For schedulers that evaluate the model several times per step, the total counts the evaluations."""
    scheduler = make_scheduler(sd15, name)
    recorder = Recorder()
    recorder.tap(scheduler)
    request_view(sd15, scheduler)(**arguments("sd15", steps=4))
    assert recorder.totals == [total]
    assert len(recorder.steps) == total


@tiny.every_family
def test_last_x0_is_the_result(family):
    """If the last step ends without noise, its predicted x0 is the scheduler's result."""
    pipeline = tiny.shared(family)
    scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
    if family == "sd15":
        # SD1.5's own DDIM stops short of zero noise.
        scheduler = diffusers.DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)
    ends = []
    step = scheduler.step

    def recording_step(*args, **kwargs):
        output = step(*args, **kwargs)
        # Consistency models hand `denoised` to the decoder, and noise it again for the next step.
        ends.append(getattr(output, "denoised", None) if hasattr(output, "denoised") else output.prev_sample)
        return output

    recording_step.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    scheduler.step = recording_step
    recorder = Recorder()
    recorder.tap(scheduler)
    request_view(pipeline, scheduler)(**arguments(family))
    last = recorder.steps[-1]
    assert last.x0().shape == last.sample.shape
    torch.testing.assert_close(last.x0(), ends[-1], rtol=1e-5, atol=1e-5 * float(ends[-1].abs().max()))


@tiny.every_family
def test_stopping_ends_the_call(family, untouched):
    """When asked to stop, the call raises `Stopped` without a further step, and the shared pipeline still works."""
    recorder = Recorder(stop_after=1)
    with pytest.raises(Stopped):
        tapped_view(family, recorder)(**arguments(family))
    assert len(recorder.steps) == 1
    assert torch.equal(tiny.shared(family)(**arguments(family))[0], untouched(family))


@tiny.every_family
def test_a_stop_while_encoding_costs_no_denoiser_call(family):
    """A request that should stop before the timesteps are set makes no step."""
    recorder = Recorder(stop_after=0)
    pipeline = tiny.shared(family)
    scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
    recorder.tap(scheduler)
    calls = []
    denoiser = DenoiserProxy(getattr(pipeline, denoiser_name(pipeline)), lambda *args, **_: calls.append(args))
    with pytest.raises(Stopped):
        request_view(pipeline, scheduler, **{denoiser_name(pipeline): denoiser})(**arguments(family))
    assert calls == recorder.steps == []


def test_stop_during_the_denoiser_takes_no_step(sd15):
    """A stop during a call of the denoiser ends the request before the scheduler's step."""
    stopping = []
    recorder = Recorder()
    scheduler = make_scheduler(sd15, "DDIMScheduler")
    StepTap(
        scheduler,
        on_start=recorder.totals.append,
        on_step=recorder.steps.append,
        should_stop=lambda: bool(stopping),
    )

    class StoppingUnet:
        """Requests the stop in its second evaluation."""

        evaluations = 0

        def __call__(self, *args, **kwargs):
            self.evaluations += 1
            if self.evaluations == 2:
                stopping.append(True)
            return sd15.unet(*args, **kwargs)

        def __getattr__(self, name):
            return getattr(sd15.unet, name)

    unet = StoppingUnet()
    with pytest.raises(Stopped):
        request_view(sd15, scheduler, unet=unet)(**arguments("sd15", steps=6))
    assert unet.evaluations == 2
    assert len(recorder.steps) == 1


def test_except_exception_does_not_catch_a_stop():
    """An `except Exception` in a pipeline does not catch `Stopped`."""
    with pytest.raises(Stopped), contextlib.suppress(Exception):
        raise Stopped


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(),
        diffusers.EulerAncestralDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.SCMScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_signatures_survive(scheduler):
    """The tap keeps the signatures, because pipelines check them for `eta`, `generator` or `sigmas`."""
    scheduler = copy.deepcopy(scheduler)
    before = inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)
    Recorder().tap(scheduler)
    assert (inspect.signature(scheduler.set_timesteps), inspect.signature(scheduler.step)) == before


@pytest.mark.parametrize("return_dict", [True, False])
def test_step_returns_an_object_or_a_tuple(return_dict):
    """The tapped step returns an output object or a tuple, as requested, with equal values."""
    plain = diffusers.EulerDiscreteScheduler()
    plain.set_timesteps(3)
    tapped = copy.deepcopy(plain)
    Recorder().tap(tapped)
    sample, output = torch.ones(1, 4, 4, 4), torch.full((1, 4, 4, 4), 0.5)
    timestep = plain.timesteps[0]
    for scheduler in (plain, tapped):
        scheduler.scale_model_input(sample, timestep)
    expected = plain.step(output, timestep, sample, return_dict=return_dict)
    actual = tapped.step(output, timestep, sample, return_dict=return_dict)
    assert type(actual) is type(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True) if not isinstance(a, str))
    assert torch.equal(actual[0], expected[0])


def test_setting_timesteps_again_starts_over():
    """If a pipeline sets its timesteps twice, `on_start` is called twice, and steps count from 1 again."""
    recorder = Recorder()
    scheduler = diffusers.DDIMScheduler()
    tap = recorder.tap(scheduler)
    sample = torch.ones(1, 4, 4, 4)
    scheduler.set_timesteps(4)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    scheduler.set_timesteps(2)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    assert recorder.totals == [4, 2]
    assert [(step.number, step.total) for step in recorder.steps] == [(1, 4), (1, 2)]
    assert tap.last is recorder.steps[-1]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "sana_sprint"])
def test_view_leaves_the_shared_pipeline_alone(family):
    """Creating a scheduler and running a view do not change the shared pipeline, its scheduler or its config."""
    pipeline = tiny.shared(family)
    scheduler_before, config_before = state(pipeline.scheduler), dict(pipeline.config)
    names_before = {name: id(component) for name, component in pipeline.components.items()}
    tapped_view(family, Recorder())(**arguments(family))
    assert state(pipeline.scheduler) == scheduler_before
    assert dict(pipeline.config) == config_before
    assert {name: id(component) for name, component in pipeline.components.items()} == names_before


def test_a_view_shares_modules_except_replaced_ones(sd15):
    """A view has its own scheduler and the given components; everything else belongs to the shared pipeline."""
    scheduler, unet = make_scheduler(sd15, "DDIMScheduler"), object()
    view = request_view(sd15, scheduler, unet=unet)
    assert view.scheduler is scheduler
    assert view.unet is unet
    assert view.vae is sd15.vae
    assert view.text_encoder is sd15.text_encoder
    assert sd15.unet is not unet
    assert sd15.scheduler is not scheduler


@tiny.every_family
def test_own_scheduler_is_copied(family):
    """Each request for the pipeline's own scheduler gets a separate one with the same configuration."""
    pipeline = tiny.shared(family)
    name = type(pipeline.scheduler).__name__
    first, second = make_scheduler(pipeline, name), make_scheduler(pipeline, name)
    assert type(first) is type(pipeline.scheduler)
    assert first.config == pipeline.scheduler.config
    assert len({id(first), id(second), id(pipeline.scheduler)}) == 3


def test_other_scheduler_takes_the_config(sd15):
    """A request for another scheduler gets that class with the noise schedule of the model's training."""
    scheduler = make_scheduler(sd15, "EulerDiscreteScheduler")
    assert type(scheduler) is diffusers.EulerDiscreteScheduler
    assert scheduler.config.beta_start == sd15.scheduler.config.beta_start
    assert scheduler.config.beta_schedule == "scaled_linear"


def test_denoiser_is_found():
    """The denoiser of a UNet pipeline is its `unet`, that of others their `transformer`."""
    names = {family: denoiser_name(tiny.shared(family)) for family in tiny.FAMILIES}
    unets = {family for family, name in names.items() if name == "unet"}
    assert unets == {"lcm", "sd15", "sdxl"}
    assert {name for family, name in names.items() if family not in unets} == {"transformer"}
