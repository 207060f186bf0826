"""The predicted x0 is correct for every scheduler, checked with an oracle that knows the true x0."""

import copy
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from calotype_server.engine.schedulers.predicted_x0 import NoiseLevel, noise_level, predict_x0
from calotype_server.engine.tap import StepTap
from support.engine.oracle import walk

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_STEPS = 6
_SHAPE = (1, 4, 6, 6)

_DISCRETE: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "dpm": (
        diffusers.DPMSolverMultistepScheduler,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++2m-karras": (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpm++2m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++2s": (diffusers.DPMSolverSinglestepScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "euler-karras": (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "kdpm2-ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}),
    "pndm-plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "pndm-prk": (diffusers.PNDMScheduler, {}),
    "sa-solver": (diffusers.SASolverScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {"clip_sample": False}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}
_KINDS = ("epsilon", "v_prediction", "sample")
# Their own `step` knows no prediction of the sample.
_NO_SAMPLE = {"euler-ancestral", "kdpm2", "kdpm2-ancestral", "pndm-plms", "pndm-prk"}

# These give a `pred_original_sample` with every step.
_REPORTING = {
    "DDIMScheduler",
    "DDPMScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
}

_FLOW = {
    "flow-euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-euler-stochastic": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True),
    "flow-heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow-lcm": diffusers.FlowMatchLCMScheduler(shift=3.0),
    "flow-dpm++2m": diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "flow-unipc": diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
}
_EDM = {
    "edm-euler": diffusers.EDMEulerScheduler(),
    "edm-dpm++2m": diffusers.EDMDPMSolverMultistepScheduler(),
}


def schedulers():
    """Yields every configuration, with the prediction type of its oracle."""
    for name, (kind_of_scheduler, config) in _DISCRETE.items():
        for kind in _KINDS:
            if kind != "sample" or name not in _NO_SAMPLE:
                scheduler = kind_of_scheduler(**_BETAS, **config, prediction_type=kind)
                yield pytest.param(scheduler, kind, id=f"{name}-{kind}")
    for name, scheduler in _FLOW.items():
        yield pytest.param(scheduler, "flow_prediction", id=name)
    for name, scheduler in _EDM.items():
        yield pytest.param(scheduler, "edm", id=name)


@pytest.mark.parametrize(("scheduler", "kind"), list(schedulers()))
def test_x0_is_exact_for_a_perfect_model(scheduler, kind):
    """With a perfect model, the predicted x0 is the true one at every step."""
    evaluations = 0
    for each in walk(scheduler, kind, _STEPS):
        torch.testing.assert_close(each.predicted, each.x0, rtol=0, atol=1e-5 * each.scale)
        evaluations += 1
    assert evaluations >= _STEPS - 1


def note_x0(seen, step):
    """Appends the predicted x0 of a step to a list."""
    seen.append(step.x0())


@pytest.mark.parametrize(("scheduler", "kind"), list(schedulers()))
def test_asking_for_x0_changes_no_bit(scheduler, kind):
    """Predicting x0 at every step does not change the final sample."""
    ends = []
    for watched in (False, True):
        mine, random, seen = copy.deepcopy(scheduler), torch.Generator().manual_seed(0), []
        if watched:
            StepTap(
                mine,
                on_start=seen.append,
                on_step=functools.partial(note_x0, seen),
                should_stop=lambda: False,
            )
        mine.set_timesteps(_STEPS)
        sample = torch.randn(_SHAPE, generator=random) * getattr(mine, "init_noise_sigma", 1.0)
        random_too = {"generator": random} if "generator" in inspect.signature(mine.step).parameters else {}
        for timestep in mine.timesteps:
            scaled = mine.scale_model_input(sample, timestep) if hasattr(mine, "scale_model_input") else sample
            sample = mine.step(torch.sin(scaled), timestep, sample, **random_too).prev_sample
        ends.append(sample)
    assert len(seen) == 1 + len(mine.timesteps)
    assert torch.equal(*ends)


@pytest.mark.parametrize(("scheduler", "kind"), list(schedulers()))
def test_x0_agrees_with_the_scheduler(scheduler, kind):
    """If a scheduler reports its own x0, it equals the predicted one."""
    compared = 0
    for each in walk(scheduler, kind, _STEPS):
        reported = getattr(each.output, "pred_original_sample", None)
        if reported is not None:
            torch.testing.assert_close(each.predicted, reported, rtol=0, atol=1e-5 * each.scale)
            compared += 1
    assert (compared > 0) == (type(scheduler).__name__ in _REPORTING)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler(**_BETAS),
        diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        diffusers.DPMSolverSinglestepScheduler(**_BETAS),
        diffusers.UniPCMultistepScheduler(**_BETAS, prediction_type="v_prediction"),
        diffusers.DEISMultistepScheduler(**_BETAS, prediction_type="sample"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_x0_agrees_with_a_multistep_history(scheduler):
    """The x0 that multistep solvers store equals the predicted one, for any model output."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(_STEPS)
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(_SHAPE, generator=random)
    for number, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(_SHAPE, generator=random)
        level = noise_level(scheduler, number, timestep)
        predicted = predict_x0(scheduler, level, sample, output)
        following = scheduler.step(output, timestep, sample).prev_sample
        kept = scheduler.model_outputs[-1]
        if isinstance(scheduler, diffusers.DEISMultistepScheduler):
            # DEIS keeps the noise that belongs to it.
            kept = (sample - level.sigma * kept) / level.alpha
        torch.testing.assert_close(predicted, kept, rtol=1e-4, atol=1e-5)
        sample = following


def test_kdpm2_second_stage_is_between_two_sigmas():
    """KDPM2 evaluates the model twice per step, the second time at an interpolated sigma, and reports its own x0."""
    scheduler = diffusers.KDPM2DiscreteScheduler(**_BETAS)
    scheduler.set_timesteps(4)
    sample, output = torch.full(_SHAPE, 3.0), torch.full(_SHAPE, 0.1)
    scheduler.scale_model_input(sample, scheduler.timesteps[0])
    first = scheduler.step(output, scheduler.timesteps[0], sample)
    scheduler.scale_model_input(first.prev_sample, scheduler.timesteps[1])
    level = noise_level(scheduler, 1, scheduler.timesteps[1])
    # The list of sigmas holds each one twice, for the two stages.
    above, below = float(scheduler.sigmas[0]), float(scheduler.sigmas[2])
    assert below < float(level.sigma) < above
    predicted = predict_x0(scheduler, level, first.prev_sample, output)
    second = scheduler.step(output, scheduler.timesteps[1], first.prev_sample)
    torch.testing.assert_close(predicted, second.pred_original_sample)


def test_tcd_second_result_is_not_x0():
    """TCD's `step` returns a noisy sample where others return x0; the tap does not mistake it for x0."""
    scheduler = diffusers.TCDScheduler(**_BETAS, clip_sample=False)
    steps = []
    StepTap(scheduler, on_start=lambda _: None, on_step=steps.append, should_stop=lambda: False)
    scheduler.set_timesteps(4)
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(_SHAPE, generator=random), torch.randn(_SHAPE, generator=random)
    timestep = scheduler.timesteps[1]
    sample = scheduler.add_noise(x0, noise, timestep.reshape(1))
    output = scheduler.step(noise, timestep, sample, return_dict=False, generator=random)
    torch.testing.assert_close(steps[0].x0(), x0, rtol=0, atol=1e-5)
    assert not torch.allclose(output[1], x0, atol=1e-2)


def test_lcm_shows_its_consistency_output():
    """LCM reports `denoised`, which is closer to the image; it is used instead of the plain x0."""
    # The scaling makes the two differ by more than rounding.
    scheduler = diffusers.LCMScheduler(**_BETAS, clip_sample=False, timestep_scaling=0.01)
    steps = []
    StepTap(scheduler, on_start=lambda _: None, on_step=steps.append, should_stop=lambda: False)
    scheduler.set_timesteps(2)
    random = torch.Generator().manual_seed(0)
    sample, output = torch.randn(_SHAPE, generator=random), torch.randn(_SHAPE, generator=random)
    stepped = scheduler.step(output, scheduler.timesteps[0], sample, generator=random)
    assert torch.equal(steps[0].x0(), stepped.denoised)
    assert not torch.allclose(predict_x0(scheduler, steps[0].level, sample, output), stepped.denoised, atol=1e-3)


def test_scm_shows_what_it_reports():
    """SCM (Sana-Sprint) reports x0 = cos(t) x - sin(t) m, scaled by the data's sigma."""
    scheduler = diffusers.SCMScheduler()
    steps = []
    StepTap(scheduler, on_start=lambda _: None, on_step=steps.append, should_stop=lambda: False)
    scheduler.set_timesteps(2)
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(_SHAPE, generator=random), torch.randn(_SHAPE, generator=random)
    angle = scheduler.timesteps[1]
    # The trigonometric flow's own forward process and velocity, Lu & Song 2024 (arXiv 2410.11081).
    sample = angle.cos() * x0 + angle.sin() * noise
    velocity = angle.cos() * noise - angle.sin() * x0
    scheduler.step(velocity, angle, sample, generator=random)
    assert steps[0].level is None
    torch.testing.assert_close(steps[0].x0(), x0, rtol=0, atol=1e-5)


def test_learned_variance_is_cut_off():
    """A model that also predicts a variance has twice the channels; only the first half is the noise."""
    scheduler = diffusers.DDPMScheduler(**_BETAS, clip_sample=False, variance_type="learned_range")
    scheduler.set_timesteps(4)
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(_SHAPE, generator=random), torch.randn(_SHAPE, generator=random)
    timestep = scheduler.timesteps[1]
    sample = scheduler.add_noise(x0, noise, timestep.reshape(1))
    output = torch.cat([noise, torch.full_like(noise, 9.0)], dim=1)
    predicted = predict_x0(scheduler, noise_level(scheduler, 1, timestep), sample, output)
    torch.testing.assert_close(predicted, x0, rtol=0, atol=1e-5)


def test_packed_tokens_work_as_well():
    """The formulas are the same for packed tokens, (batch, tokens, channels)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(1, 9, 16, generator=random), torch.randn(1, 9, 16, generator=random)
    timestep = scheduler.timesteps[2]
    sample = scheduler.scale_noise(x0, timestep.reshape(1), noise)
    predicted = predict_x0(scheduler, noise_level(scheduler, 2, timestep), sample, noise - x0)
    torch.testing.assert_close(predicted, x0, rtol=0, atol=1e-5)


class UnknownScheduler:
    """A scheduler with a config and steps, but without known noise levels."""

    def __init__(self, **config):
        self.config = config

    def set_timesteps(self, steps):
        self.timesteps = torch.arange(steps).flip(0)

    def step(self, model_output, timestep, sample, return_dict=True):
        return SimpleNamespace(prev_sample=sample - model_output)


@pytest.mark.parametrize("config", [{}, {"prediction_type": "epsilon"}, {"num_train_timesteps": 1000}])
def test_unknown_scheduler_has_no_noise_level(config):
    """An unknown kind of scheduler gives None, not a guess."""
    scheduler = UnknownScheduler(**config)
    scheduler.set_timesteps(4)
    assert noise_level(scheduler, 0, scheduler.timesteps[0]) is None


def test_unknown_scheduler_gives_steps_without_x0():
    """With an unknown scheduler the tap still reports every step, without x0."""
    scheduler, steps = UnknownScheduler(), []
    StepTap(scheduler, on_start=lambda _: None, on_step=steps.append, should_stop=lambda: False)
    scheduler.set_timesteps(2)
    sample = torch.ones(_SHAPE)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(sample, timestep, sample).prev_sample
    assert [step.number for step in steps] == [1, 2]
    assert [step.x0() for step in steps] == [None, None]


def test_unknown_prediction_type_gives_none():
    """An unknown prediction type gives None, not a guess."""
    level = NoiseLevel("telepathy", 0.5, 0.5)
    assert predict_x0(None, level, torch.ones(_SHAPE), torch.ones(_SHAPE)) is None
