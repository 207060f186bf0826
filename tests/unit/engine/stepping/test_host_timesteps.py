"""With host timesteps, schedulers wait less often for the device, and compute the same bits."""

import contextlib
import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch

from calotype_server.engine import generation_run
from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.capabilities.schedulers import prediction_kind
from calotype_server.engine.factory import load_engine
from calotype_server.engine.protocol import Stop
from calotype_server.engine.requests.denoiser_proxy import DenoiserProxy
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.runtime.eager import EagerRuntime
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.stepping.host_timesteps import HOSTED, keep_timesteps_on_host
from calotype_server.engine.tap import StepTap
from calotype_server.observability.events import ignore
from calotype_server.settings import Settings
from calotype_server.types import Job
from support.engine import tiny
from support.engine.stand_in_device import DEVICE, OnDevice, StandInDevice
from support.engine.tiny_inputs import arguments

NONE = (0, 0)
NOISE = (0, 1)
"""The noise of a step comes from a generator on the CPU."""

WAITS = {
    "CogVideoXDDIMScheduler": ((3, 0), NONE),
    "DDIMInverseScheduler": ((4, 0), NONE),
    "DDIMParallelScheduler": ((6, 0), NONE),
    "DDIMScheduler": ((6, 0), NONE),
    "DDPMParallelScheduler": ((13, 1), NOISE),
    "DDPMScheduler": ((13, 1), NOISE),
    "DEISMultistepScheduler": (NONE, NONE),
    "DPMSolverMultistepInverseScheduler": (NONE, NONE),
    "DPMSolverMultistepScheduler": (NONE, NONE),
    "DPMSolverSinglestepScheduler": (NONE, NONE),
    "EDMDPMSolverMultistepScheduler": (NONE, NONE),
    "EDMEulerScheduler": (NONE, NONE),
    "EulerAncestralDiscreteScheduler": (NOISE, NOISE),
    "EulerDiscreteScheduler": (NONE, NONE),
    "FlowMapEulerDiscreteScheduler": ((3, 0), NONE),
    "FlowMatchEulerDiscreteScheduler": (NONE, NONE),
    # Its `sigmas` are on the device, and a factor of the latents.
    "FlowMatchHeunDiscreteScheduler": ((2, 0), (2, 0)),
    "FlowMatchLCMScheduler": (NOISE, NOISE),
    "HeunDiscreteScheduler": (NONE, NONE),
    "KDPM2AncestralDiscreteScheduler": (NOISE, NOISE),
    "KDPM2DiscreteScheduler": (NONE, NONE),
    "LCMScheduler": ((3, 1), NOISE),
    "LMSDiscreteScheduler": (NONE, NONE),
    "PNDMScheduler": ((2, 0), NONE),
    "SASolverScheduler": ((4, 1), NOISE),
    "TCDScheduler": ((4, 1), NOISE),
    "UnCLIPScheduler": ((12, 1), NOISE),
    # It makes small tensors on the device from numbers, and solves a system of equations there.
    "UniPCMultistepScheduler": ((0, 6), (0, 6)),
}
"""Reads from the device and copies to it in a step in the middle: with device timesteps, and with host timesteps."""

LEFT_ALONE = {
    # The stand-in cannot compute their Brownian paths, so they are not examined.
    "CosineDPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    # It computes a factor of the latents from its timesteps.
    "MiniMaxH3Scheduler",
}

CHANGED = sorted(name for name, (before, after) in WAITS.items() if before != after)
UNCHANGED = sorted(WAITS.keys() - CHANGED)
SCHEDULERS = [*CHANGED, *(pytest.param(name, marks=pytest.mark.slow) for name in UNCHANGED)]

VARIANTS = [
    *((name, {}) for name in CHANGED),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in UNCHANGED),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
]
"""Classes with configs: integer and fractional timesteps, several spacings, shifted sigmas."""

STEPS = 8
MIDDLE = 5
"""Index of a step in the middle, in which second-order schedulers draw noise."""


def examined(name, hosted, config=None, begins=False):
    """Runs a scheduler on the stand-in device, as a pipeline does; `begins` sets the index of the first step.

    Returns:
        The result, the waits of each step, and the operations on latents.
    """
    scheduler = getattr(diffusers, name)(**(config or {}))
    with StandInDevice() as device, torch.no_grad():
        if hosted:
            keep_timesteps_on_host(scheduler)
        sample = OnDevice(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
        shift = {"mu": 0.7} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(STEPS, device=DEVICE, **shift)
        if begins and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        noise = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            noise["generator"] = torch.Generator().manual_seed(2)
        waits, operations = [], []
        for timestep in scheduler.timesteps:
            device.reset()
            scaled = sample
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(sample, timestep)
            output = scaled * 0.3 + 0.01
            sample = scheduler.step(output, timestep, sample, **noise, return_dict=False)[0]
            waits.append((device.reads.total(), device.copies.total()))
            operations.append(tuple(device.operations))
    return sample.on_cpu, waits, operations


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
def test_every_scheduler_is_classified():
    """Each scheduler of diffusers that can be offered has expected counts here, or a reason to leave it alone."""
    offered = set()
    for name, kind in inspect.getmembers(diffusers, inspect.isclass):
        with contextlib.suppress(Exception):  # It needs arguments or packages.
            if name.endswith("Scheduler") and prediction_kind(SimpleNamespace(scheduler=kind()), name):
                offered.add(name)
    assert len(offered) > 20
    assert offered == WAITS.keys() | LEFT_ALONE
    assert WAITS.keys() == HOSTED


@pytest.mark.parametrize(("name", "config"), VARIANTS, ids=lambda value: value if isinstance(value, str) else None)
def test_results_are_bit_identical(name, config):
    """With host timesteps a scheduler computes the same bits, by the same operations with the same kinds of factors."""
    expected, _, operations = examined(name, False, config)
    result, _, hosted_operations = examined(name, True, config)
    assert torch.isfinite(result).all()
    assert torch.equal(result, expected)
    assert hosted_operations == operations


@pytest.mark.parametrize("begins", [False, True], ids=["found", "given"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_wait_as_often_as_expected(name, begins):
    """Reading timesteps on the host avoids the waits of a step, apart from noise and factors of the latents."""
    before, after = WAITS[name]
    assert examined(name, False, begins=begins)[1][MIDDLE] == before
    waits = examined(name, True, begins=begins)[1]
    assert waits[MIDDLE] == after
    # The first step copies the timesteps.
    assert waits[0][0] <= after[0] + 1


@pytest.mark.parametrize("name", sorted(LEFT_ALONE))
def test_other_schedulers_are_left_alone(name):
    """A scheduler that computes with its timesteps keeps them on the device."""
    scheduler = getattr(diffusers, name)()
    before = dict(vars(scheduler))
    keep_timesteps_on_host(scheduler)
    assert vars(scheduler) == before


def test_a_known_first_index_needs_no_copy():
    """A scheduler that looks up nothing, because the pipeline has set its first index, causes no copy of timesteps."""
    scheduler = diffusers.EulerDiscreteScheduler()
    with StandInDevice() as device, torch.no_grad():
        keep_timesteps_on_host(scheduler)
        scheduler.set_timesteps(STEPS, device=DEVICE)
        scheduler.set_begin_index(0)
        device.reset()
        sample = OnDevice(torch.ones(1, 4, 8, 8))
        for timestep in scheduler.timesteps:
            sample = scheduler.step(sample * 0.3, timestep, sample).prev_sample
    assert (device.reads.total(), device.copies.total()) == NONE


def test_foreign_timesteps_are_passed_on():
    """Numbers, tensors of a pipeline's own and those of an earlier `set_timesteps` reach the scheduler unchanged."""
    scheduler, received = diffusers.DDIMScheduler(), []
    scheduler.step = lambda *args: received.append(args[1])
    keep_timesteps_on_host(scheduler)
    with StandInDevice():
        scheduler.set_timesteps(3, device=DEVICE)
        stale = scheduler.timesteps[1]
        scheduler.set_timesteps(4, device=DEVICE)
        foreign = [7, torch.tensor(7), scheduler.timesteps[1].clone(), scheduler.timesteps[:2], stale]
        for timestep in foreign:
            scheduler.step(None, timestep, None)
        assert all(a is b for a, b in zip(received, foreign, strict=True))
        scheduler.step(None, scheduler.timesteps[2], None)
        assert received[-1].device.type == "cpu"


UNTRACEABLE = {"aura_flow", "lumina2", "z_image"}
READS_PER_STEP = {"sd15": 7, "lcm": 4}
"""Without host timesteps; one of them is the tap's."""


def generated(family, hosted):
    """Generates on the stand-in device, through the tap and a runtime; returns latents, and the waits of each step."""
    pipeline = tiny.build(family)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            move(component)
    scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
    runtime, digests = EagerRuntime(getattr(pipeline, denoiser_name(pipeline))), {}

    def answer(*args, **kwargs):
        call = runtime.collator.bind(args, kwargs, digests)
        return runtime.run([call], call.rows)

    with StandInDevice() as device:
        waits = []

        def on_step(_):
            waits.append((device.reads.total(), device.copies.total()))
            device.reset()

        StepTap(scheduler, on_start=lambda _: device.reset(), on_step=on_step, should_stop=lambda: False)
        if hosted:
            keep_timesteps_on_host(scheduler)
        denoiser = {denoiser_name(pipeline): DenoiserProxy(runtime.module, answer)}
        given = {name: value if name == "generator" else moved(value) for name, value in arguments(family).items()}
        latents = request_view(pipeline, scheduler, **denoiser)(**given)[0]
    return latents.on_cpu, tuple(waits)


def job(model):
    """Returns a job of two steps."""
    return Job(
        prompt="a red apple",
        negative_prompt=None,
        width=model.width,
        height=model.height,
        step_count=2,
        guidance_scale=model.guidance_scale,
        seed=1,
        scheduler=model.scheduler,
    )


def move(module):
    """Moves a module's weights to the stand-in device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: moved(value) for name, value in tensors.items()})


def moved(value):
    """Returns a tensor on the stand-in device; anything else as it is."""
    return OnDevice(value.detach()) if isinstance(value, torch.Tensor) else value


@tiny.every_family
def test_a_whole_generation_waits_less(family):
    """A pipeline on the device computes the same bits with host timesteps, and its steps never wait for more reads."""
    if family in UNTRACEABLE:
        pytest.skip("it reads lists from the device, which the stand-in cannot do")
    images, waits = zip(*(generated(family, hosted) for hosted in (False, True)), strict=True)
    assert torch.equal(*images)
    assert waits[1][1:] == tuple((0, copies) for _, copies in waits[0][1:])
    assert waits[0][-2][0] == READS_PER_STEP.get(family, 0)


def test_the_setting_reaches_schedulers(sd15_folder, tmp_path, monkeypatch):
    """With `--host-timesteps`, which is off by default, each request's scheduler gets host timesteps."""
    hosted = []
    monkeypatch.setattr(generation_run, "keep_timesteps_on_host", hosted.append)
    settings = Settings(
        model=str(sd15_folder), host_timesteps=True, max_active=1, threads=1, memory_limit=0, cache_dir=tmp_path
    )
    engine = load_engine(settings, ignore)
    try:
        engine.run(job(engine.model), lambda _: None, Stop())
    finally:
        engine.close()
    assert [type(each).__name__ for each in hosted] == [engine.model.scheduler]
    assert not Settings().host_timesteps


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(WAITS))
def test_on_cuda_steps_do_not_wait_and_bits_are_equal(name, dtype):
    """On CUDA a step with host timesteps gives the same bits, and waits only where that is expected."""
    results = []
    for hosted in (False, True):
        scheduler = getattr(diffusers, name)()
        if hosted:
            keep_timesteps_on_host(scheduler)
        sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
        scheduler.set_timesteps(STEPS, device="cuda")
        noise = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            noise["generator"] = torch.Generator().manual_seed(2)
        for number, timestep in enumerate(scheduler.timesteps):
            checked = hosted and number and WAITS[name][1] == NONE
            torch.cuda.set_sync_debug_mode("error" if checked else "default")
            try:
                scaled = sample
                if hasattr(scheduler, "scale_model_input"):
                    scaled = scheduler.scale_model_input(sample, timestep)
                sample = scheduler.step(scaled * 0.3 + 0.01, timestep, sample, **noise, return_dict=False)[0]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        results.append(sample)
    assert torch.equal(*results)
