"""Flow models with other schedulers than their own."""

import functools
from types import SimpleNamespace

import diffusers
import pytest
import torch

from calotype_server.engine.capabilities.schedulers import compatible_schedulers, scheduler_details
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.flow import FLOW_SCHEDULERS, is_flow
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.schedulers.names import Name, read_name
from calotype_server.engine.schedulers.noise import draw_noise_from
from calotype_server.engine.tap import StepTap
from calotype_server.types import Sigmas
from support.engine import tiny
from support.engine.oracle import walk
from support.engine.tiny_inputs import arguments

EULER = "FlowMatchEulerDiscreteScheduler"
STEPS = 5

OWN = {
    "plain": diffusers.FlowMatchEulerDiscreteScheduler(),
    "shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dynamic": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    "linear": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    # As Qwen-Image.
    "terminal": diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, max_image_seq_len=8192, max_shift=0.9
    ),
    "karras": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_karras_sigmas=True),
    "lcm": diffusers.FlowMatchLCMScheduler(shift=3.0),
    # As Sana.
    "dpm": diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "unipc": diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, use_dynamic_shifting=True
    ),
}

FAMILIES = [family for family in tiny.FAMILIES if is_flow(tiny.shared(family).scheduler)]
QUICK = {"flux", "z_image"}
"""One pipeline that passes sigmas and a shift, and one that calls the model with another timestep."""


def pipeline_with(own):
    """Returns an object that has only this scheduler."""
    return SimpleNamespace(scheduler=own)


def choices(own):
    """Yields every name and noise levels on offer for a model with this scheduler."""
    pipeline = pipeline_with(own)
    for info in scheduler_details(pipeline, compatible_schedulers(pipeline)):
        for spelling in (info.name, *info.aliases):
            name = read_name(spelling) or Name(spelling)
            for sigmas in {name.sigmas, *(info.sigmas if spelling == info.name else ())}:
                yield name.scheduler, sigmas


def mu_of(own):
    """Returns the further arguments that a scheduler needs."""
    return {"mu": 0.7} if own.config.get("use_dynamic_shifting") else {}


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_every_choice_is_right_for_a_perfect_model(own):
    """With a perfect model, each scheduler on offer predicts the true x0 at every step and ends there."""
    tried = set()
    for name, sigmas in choices(own):
        scheduler = make_scheduler(pipeline_with(own), name, sigmas)
        tried.add(type(scheduler).__name__)
        *_, last = evaluations = list(walk(scheduler, "flow_prediction", STEPS, **mu_of(own)))
        for each in evaluations:
            torch.testing.assert_close(each.predicted, each.x0, rtol=0, atol=1e-4, msg=f"{name} {sigmas}")
        torch.testing.assert_close(last.output.prev_sample, last.x0, rtol=0, atol=1e-4, msg=f"{name} {sigmas}")
    assert tried == set(FLOW_SCHEDULERS)


@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_all_take_the_noise_levels_of_the_models_own_scheduler(own):
    """Each scheduler steps through the sigmas that the model's own would compute from the pipeline's arguments."""
    given = mu_of(own) if own.config.get("use_flow_sigmas") else {"sigmas": [1.0, 0.7, 0.3], **mu_of(own)}
    expected = make_scheduler(pipeline_with(own), type(own).__name__)
    expected.set_timesteps(3, **given)
    for name in FLOW_SCHEDULERS:
        scheduler = make_scheduler(pipeline_with(own), name)
        scheduler.set_timesteps(3, **given)
        sigmas = torch.unique_consecutive(scheduler.sigmas)
        torch.testing.assert_close(sigmas, expected.sigmas, rtol=0, atol=2e-6)
        # Some schedulers have whole timesteps, and others the same numbers as floats.
        timesteps = torch.unique_consecutive(scheduler.timesteps).float()
        torch.testing.assert_close(timesteps, expected.timesteps.float())


def test_noise_levels_can_be_chosen():
    """Karras, exponential and beta sigmas change the noise levels of each scheduler in the same way."""
    plain = make_scheduler(pipeline_with(OWN["shifted"]), EULER)
    plain.set_timesteps(STEPS)
    for sigmas in Sigmas:
        levels = []
        for name in ("Euler", "DPM++ 2M", "UniPC", "LCM"):
            scheduler = make_scheduler(pipeline_with(OWN["shifted"]), name, sigmas)
            scheduler.set_timesteps(STEPS)
            levels.append(scheduler.sigmas)
            torch.testing.assert_close(scheduler.sigmas, levels[0], rtol=0, atol=2e-6)
        assert not torch.allclose(levels[0], plain.sigmas, atol=0.01)


def test_an_alias_has_plain_noise_levels():
    """Without noise levels, an alias has the plain ones, but a class name those of the model's config."""
    pipeline = pipeline_with(OWN["karras"])
    ends = []
    for name, sigmas in (("Euler", None), (EULER, None), ("Euler", Sigmas.KARRAS)):
        scheduler = make_scheduler(pipeline, name, sigmas)
        scheduler.set_timesteps(STEPS)
        ends.append(scheduler.sigmas)
    assert torch.equal(ends[1], ends[2])
    assert not torch.allclose(ends[0], ends[1], atol=0.01)


def test_inverted_sigmas_offer_only_their_own_scheduler():
    """A model with inverted sigmas has no other solver, and no sampler that adds noise, which would be wrong."""
    pipeline = pipeline_with(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    assert compatible_schedulers(pipeline) == (EULER,)
    (info,) = scheduler_details(pipeline, (EULER,))
    assert info.aliases == ("Euler", "Euler Karras")
    for sigmas in (None, *info.sigmas):
        scheduler = make_scheduler(pipeline, "Euler", sigmas)
        *_, last = walk(scheduler, "inverted_flow_prediction", STEPS)
        torch.testing.assert_close(last.output.prev_sample, last.x0, rtol=0, atol=1e-4)


def drawn(family, own, name, sigmas=None, seed=1):
    """Draws with a tiny pipeline; returns the last step and the latents that the scheduler ended with."""
    pipeline = tiny.shared(family)
    view = pipeline if own is None else request_view(pipeline, own)
    scheduler = make_scheduler(view, name, sigmas)
    call = arguments(family, steps=STEPS, seed=seed)
    draw_noise_from(scheduler, call["generator"], seed)
    ends, step = [], scheduler.step

    @functools.wraps(step)
    def kept_step(*args, **kwargs):
        output = step(*args, **kwargs)
        ends.append(output.prev_sample)
        return output

    scheduler.step = kept_step
    tap = StepTap(scheduler, on_start=lambda _: None, on_step=lambda _: None, should_stop=lambda: False)
    request_view(pipeline, scheduler)(**call)
    assert tap.last.number == tap.last.total
    return tap.last, ends[-1]


@pytest.mark.parametrize(
    "family", [family if family in QUICK else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
@pytest.mark.parametrize("own", [None, "terminal"])
def test_every_choice_runs_with_the_pipeline(family, own):
    """Each pipeline runs with each scheduler on offer, which ends at its last predicted x0."""
    if own is not None and family in ("aura_flow", "chroma", "sana"):
        pytest.skip("it passes no shift that depends on the size")
    ends = {}
    for name, sigmas in choices(tiny.shared(family).scheduler if own is None else OWN[own]):
        last, end = drawn(family, own and OWN[own], name, sigmas)
        assert torch.isfinite(end).all()
        torch.testing.assert_close(last.x0().to(end.dtype), end, rtol=1e-3, atol=1e-4, msg=f"{name} {sigmas}")
        ends[name, sigmas] = end
    assert not torch.allclose(ends["Euler", None], ends["DPM++ 2M", None], atol=1e-4)
    assert not torch.allclose(ends["Euler", None], ends["Euler a", None], atol=1e-3)


@pytest.mark.parametrize("name", ["Euler a", "DPM++ 2M SDE", "LCM"])
def test_the_seed_determines_added_noise(name):
    """A sampler that adds noise draws it from the request's generator, though the pipeline passes none."""
    before = torch.random.get_rng_state()
    first, again, other = (drawn("flux", None, name, seed=seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    assert torch.equal(torch.random.get_rng_state(), before)
