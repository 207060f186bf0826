"""Every scheduler class of diffusers with every option, on a perfect model. New ones must be classified here.

The predicted x0 must be the true one at every step. Whether the scheduler then ends at x0 is up to diffusers: the
tables say where it does not, and such combinations must not be on offer.
"""

import inspect
import math
import typing
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from calotype_server.engine.capabilities.schedulers import compatible_schedulers, scheduler_details
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.schedulers.names import ALIASES, read_name
from calotype_server.types import Sigmas
from support.engine.oracle import walk

RIGHT = "ends at x0"
NOISY = "leaves the noise of its last timestep"
WRONG = "ends elsewhere"
REFUSED = "raises an exception"

STEPS = 6
SLOW = {"DPMSolverSDEScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler"}
"""They take up to 0.3 s to make with 1000 timesteps, so the tests use fewer."""

UNSUPPORTED = {
    "AmusedScheduler": "tokens",
    "BlockRefinementScheduler": "tokens",
    "CMStochasticIterativeScheduler": "pixels of unconditional models",
    "CogVideoXDPMScheduler": "its step takes more arguments; videos",
    "CosineDPMSolverMultistepScheduler": "audio",
    "DDIMInverseScheduler": "from images to noise",
    "DDPMWuerstchenScheduler": "decodes another model's latents",
    "DiscreteDDIMScheduler": "tokens",
    "DPMSolverMultistepInverseScheduler": "from images to noise",
    "EntropyBoundScheduler": "tokens",
    "HeliosDMDScheduler": "videos",
    "HeliosScheduler": "videos",
    "IPNDMScheduler": "audio",
    "KarrasVeScheduler": "pixels of unconditional models",
    "LTXEulerAncestralRFScheduler": "videos",
    "MiniMaxH3Scheduler": "videos",
    "PiflowScheduler": "its model predicts a policy",
    "RFD4ProteinaScheduler": "proteins",
    "RePaintScheduler": "its step takes an image",
    "SCMScheduler": "reports its own x0; tested with the tap",
    "ScoreSdeVeScheduler": "pixels of unconditional models",
    "UnCLIPScheduler": "embeddings",
    "VQDiffusionScheduler": "tokens",
}
"""They are not on offer, unless one is a model's own: then there are previews if it reports x0, and progress if not."""

BASE = {
    "CogVideoXDDIMScheduler": RIGHT,
    "DDIMParallelScheduler": RIGHT,
    "DDIMScheduler": RIGHT,
    "DDPMParallelScheduler": RIGHT,
    "DDPMScheduler": RIGHT,
    "DEISMultistepScheduler": NOISY,
    "DPMSolverMultistepScheduler": RIGHT,
    "DPMSolverSDEScheduler": RIGHT,
    "DPMSolverSinglestepScheduler": RIGHT,
    "EDMDPMSolverMultistepScheduler": RIGHT,
    "EDMEulerScheduler": RIGHT,
    "EulerAncestralDiscreteScheduler": RIGHT,
    "EulerDiscreteScheduler": RIGHT,
    "FlowMapEulerDiscreteScheduler": RIGHT,
    "FlowMatchEulerDiscreteScheduler": RIGHT,
    "FlowMatchHeunDiscreteScheduler": RIGHT,
    "FlowMatchLCMScheduler": RIGHT,
    "HeunDiscreteScheduler": RIGHT,
    "KDPM2AncestralDiscreteScheduler": RIGHT,
    "KDPM2DiscreteScheduler": RIGHT,
    "LCMScheduler": RIGHT,
    "LMSDiscreteScheduler": RIGHT,
    "PNDMScheduler": NOISY,
    "SASolverScheduler": NOISY,
    "TCDScheduler": NOISY,
    "UniPCMultistepScheduler": RIGHT,
}
"""How each other class ends with its default options, for a model that predicts its kind of output."""

VALUES: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "data_prediction"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "clip_sample": (True,),
    "euler_at_final": (True,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"),
    "invert_sigmas": (True,),
    "lower_order_final": (True, False),
    "predict_x0": (True, False),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow_prediction"),
    "rescale_betas_zero_snr": (True,),
    "set_alpha_to_one": (True, False),
    "sigma_schedule": ("karras", "exponential"),
    "skip_prk_steps": (True, False),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "stochastic_sampling": (True,),
    "thresholding": (True,),
    "time_shift_type": ("exponential", "linear"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "timestep_type": ("discrete", "continuous"),
    "use_beta_sigmas": (True,),
    "use_dynamic_shifting": (True,),
    "use_exponential_sigmas": (True,),
    "use_flow_sigmas": (True,),
    "use_karras_sigmas": (True,),
    "use_lu_lambdas": (True,),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""All values of the options that are not numbers. `variance_type` also has learned variances, which need a model."""

NUMBERS = {
    *("base_image_seq_len", "base_shift", "beta_end", "beta_start", "clip_sample_range", "corrector_order"),
    *("dynamic_thresholding_ratio", "flow_shift", "lambda_min_clipped", "max_image_seq_len", "max_shift"),
    *("noise_sampler_seed", "num_train_timesteps", "original_inference_steps", "predictor_order", "rho"),
    *("sample_max_value", "shift", "shift_terminal", "sigma_data", "sigma_max", "sigma_min", "snr_shift_scale"),
    *("solver_order", "steps_offset", "timestep_scaling", "trained_betas"),
}

OTHERS = {
    "disable_corrector": "steps without UniPC's correction",
    "scale_factors": "changes the size of the image; see `is_flow`",
    "solver_p": "another scheduler",
    "tau_func": "a function",
    "upscale_mode": "only with `scale_factors`",
}

TOGETHER: dict[tuple[str, Any], dict[str, Any]] = {
    ("algorithm_type", "dpmsolver"): {"final_sigmas_type": "sigma_min"},
    ("algorithm_type", "sde-dpmsolver"): {"final_sigmas_type": "sigma_min"},
    ("prediction_type", "flow_prediction"): {"use_flow_sigmas": True},
    ("rescale_betas_zero_snr", True): {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    ("use_flow_sigmas", True): {"prediction_type": "flow_prediction"},
}
"""Options that need others."""

ENDS: dict[tuple[str, str, Any], str] = {
    ("*", "beta_schedule", "sigmoid"): REFUSED,
    ("*", "clip_sample", True): WRONG,
    ("*", "final_sigmas_type", "sigma_min"): NOISY,
    ("*", "prediction_type", "flow_prediction"): REFUSED,
    ("*", "set_alpha_to_one", False): NOISY,
    ("*", "thresholding", True): WRONG,
    ("CogVideoXDDIMScheduler", "clip_sample", True): RIGHT,
    ("CogVideoXDDIMScheduler", "rescale_betas_zero_snr", True): NOISY,
    ("CogVideoXDDIMScheduler", "timestep_spacing", "trailing"): NOISY,
    ("DDIMParallelScheduler", "rescale_betas_zero_snr", True): NOISY,
    ("DDIMParallelScheduler", "timestep_spacing", "trailing"): NOISY,
    ("DDIMScheduler", "rescale_betas_zero_snr", True): NOISY,
    ("DDIMScheduler", "timestep_spacing", "trailing"): NOISY,
    ("DDPMParallelScheduler", "beta_schedule", "sigmoid"): RIGHT,
    ("DDPMParallelScheduler", "variance_type", "fixed_large_log"): WRONG,
    ("DDPMScheduler", "beta_schedule", "sigmoid"): RIGHT,
    ("DDPMScheduler", "variance_type", "fixed_large_log"): WRONG,
    ("DEISMultistepScheduler", "prediction_type", "flow_prediction"): WRONG,
    ("DEISMultistepScheduler", "use_flow_sigmas", True): WRONG,
    ("DPMSolverMultistepScheduler", "algorithm_type", "dpmsolver"): NOISY,
    ("DPMSolverMultistepScheduler", "algorithm_type", "sde-dpmsolver"): WRONG,
    ("DPMSolverMultistepScheduler", "prediction_type", "flow_prediction"): RIGHT,
    ("DPMSolverSDEScheduler", "prediction_type", "sample"): REFUSED,
    ("DPMSolverSinglestepScheduler", "algorithm_type", "dpmsolver"): NOISY,
    ("DPMSolverSinglestepScheduler", "prediction_type", "flow_prediction"): RIGHT,
    ("EDMDPMSolverMultistepScheduler", "prediction_type", "sample"): REFUSED,
    ("EulerAncestralDiscreteScheduler", "prediction_type", "sample"): REFUSED,
    ("EulerDiscreteScheduler", "interpolation_type", "log_linear"): NOISY,
    ("FlowMatchLCMScheduler", "invert_sigmas", True): WRONG,
    ("KDPM2AncestralDiscreteScheduler", "prediction_type", "sample"): REFUSED,
    ("KDPM2DiscreteScheduler", "prediction_type", "sample"): REFUSED,
    ("LCMScheduler", "set_alpha_to_one", False): RIGHT,
    ("PNDMScheduler", "set_alpha_to_one", True): RIGHT,
    ("PNDMScheduler", "timestep_spacing", "linspace"): WRONG,
    **{("SASolverScheduler", "algorithm_type", each): REFUSED for each in VALUES["algorithm_type"][:-1]},
    ("SASolverScheduler", "prediction_type", "flow_prediction"): WRONG,
    ("SASolverScheduler", "use_flow_sigmas", True): WRONG,
    ("TCDScheduler", "clip_sample", True): NOISY,
    ("TCDScheduler", "thresholding", True): NOISY,
    ("UniPCMultistepScheduler", "lower_order_final", False): WRONG,
    ("UniPCMultistepScheduler", "predict_x0", False): WRONG,
    ("UniPCMultistepScheduler", "prediction_type", "flow_prediction"): RIGHT,
    ("UniPCMultistepScheduler", "solver_type", "bh1"): WRONG,
}
"""How a class ends with one option, if not as with its default options. "*" stands for all other classes."""


def classes():
    """Returns the scheduler classes that diffusers exports."""
    found = {}
    for name in dir(diffusers):
        if name.endswith("Scheduler") and inspect.isclass(kind := getattr(diffusers, name)):
            found[name] = kind
    return found


def options(kind):
    """Returns the parameters of a class's `__init__`."""
    return {name: each for name, each in inspect.signature(kind.__init__).parameters.items() if name != "self"}


def listed(annotation):
    """Returns the values that an annotation lists."""
    if typing.get_origin(annotation) is typing.Literal:
        return set(typing.get_args(annotation))
    return {value for each in typing.get_args(annotation) for value in listed(each)}


def outcome(kind, config):
    """Returns how a class with this config ends with a perfect model; asserts that each predicted x0 is true."""
    accepted = options(kind)
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
    config = {**betas, "num_train_timesteps": 100 if kind.__name__ in SLOW else 1000, **config}
    config = {name: value for name, value in config.items() if name in accepted}
    predicts = config.get("prediction_type", "epsilon")
    if kind.__name__.startswith("FlowM"):
        predicts = "inverted_flow_prediction" if config.get("invert_sigmas") else "flow_prediction"
    elif kind.__name__.startswith("EDM"):
        predicts = "edm_v" if predicts == "v_prediction" else "edm"
    given = {"mu": 0.7} if config.get("use_dynamic_shifting") else {}
    try:
        evaluations = list(walk(kind(**config), predicts, STEPS, **given))
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return REFUSED
    return _end_of(evaluations, f"{kind.__name__} {config}")


def _end_of(evaluations, what):
    for each in evaluations:
        error = float((each.predicted - each.x0).abs().max())
        # After an error of the scheduler, there is nothing left to predict.
        assert math.isnan(error) or error < 2e-5 * each.scale, (what, error)
    error = float((evaluations[-1].output.prev_sample - evaluations[-1].x0).abs().max())
    return WRONG if math.isnan(error) or error > 0.15 else NOISY if error > 1e-3 else RIGHT


def test_every_class_is_classified():
    """Each scheduler class of the installed diffusers is either tried here, or has a reason why it is not."""
    assert set(classes()) == BASE.keys() | UNSUPPORTED.keys()
    assert not BASE.keys() & UNSUPPORTED.keys()


def test_every_option_is_classified():
    """Each option of each class is tried here with all values that its annotation lists, or is a number."""
    for name in BASE:
        for option, parameter in options(classes()[name]).items():
            assert option in VALUES.keys() | NUMBERS | OTHERS.keys(), (name, option)
            values = listed(parameter.annotation) - {"learned", "learned_range"}
            if option in VALUES:
                assert values <= set(VALUES[option]), (name, option)
            else:
                assert not values or option in OTHERS, (name, option)
                assert not isinstance(parameter.default, bool), (name, option)


@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
@pytest.mark.parametrize("name", BASE)
def test_every_option_ends_as_expected(name):
    """With each option, each predicted x0 is the true one, and the scheduler ends as the table says."""
    kind = classes()[name]
    assert outcome(kind, {}) == BASE[name]
    for option, parameter in options(kind).items():
        values = VALUES.get(option, ())
        for value in [each for each in values if each in (listed(parameter.annotation) or values)]:
            expected = ENDS.get((name, option, value), ENDS.get(("*", option, value), BASE[name]))
            config = {option: value, **TOGETHER.get((option, value), {})}
            assert outcome(kind, config) == expected, (option, value)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

MODELS = {
    "sd15": diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1),
    "sd21": diffusers.DDIMScheduler(**SD, clip_sample=False, prediction_type="v_prediction", set_alpha_to_one=False),
    "sdxl": diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1),
    "turbo": diffusers.EulerAncestralDiscreteScheduler(**SD, timestep_spacing="trailing"),
    "karras": diffusers.DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True, lower_order_final=False),
    "zero_snr": diffusers.DDIMScheduler(
        **SD,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    "sample": diffusers.DDPMScheduler(**SD, clip_sample=False, prediction_type="sample"),
}
"""Own schedulers of models, as released."""

QUICK = {"sample", "sd15", "zero_snr"}
"""One of each kind of prediction."""


@pytest.mark.parametrize(
    "model", [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in MODELS]
)
@pytest.mark.filterwarnings("ignore:Should have:UserWarning")
def test_everything_on_offer_is_right(model):
    """Each scheduler, alias and option on offer for a model predicts the true x0 at every step and ends there."""
    own = MODELS[model]
    kind, pipeline = own.config.prediction_type, SimpleNamespace(scheduler=own)
    quick = SimpleNamespace(scheduler=type(own).from_config(own.config, num_train_timesteps=100))
    tried = set()
    for info in scheduler_details(pipeline, compatible_schedulers(pipeline)):
        aliases = {read_name(alias).scheduler for alias in info.aliases}
        tried |= aliases
        choices: list[tuple[Any, Any]] = [(None, None), *((each, None) for each in info.sigmas)]
        choices += [(None, each) for each in info.spacings]
        for choice in choices:
            for name in (info.name, *aliases):
                scheduler = make_scheduler(quick if info.name in SLOW else pipeline, name, *choice)
                end = _end_of(list(walk(scheduler, kind, STEPS)), f"{name} {choice}")
                assert end != WRONG, (name, choice)
    expected = set(ALIASES)
    if kind != "epsilon":
        # PNDM mixes outputs of several steps, which is wrong unless they are noise.
        expected.remove("PLMS")
    if kind == "sample":
        expected -= {"DPM++ SDE", "DPM2", "DPM2 a", "Euler a"}
    assert tried == expected


@pytest.mark.parametrize("model", ["karras", "sd15", "zero_snr"])
def test_every_option_on_offer_has_an_effect(model):
    """No two options on offer lead to the same noise levels, also if the model's config has one of them."""
    own = MODELS[model]
    pipeline = SimpleNamespace(scheduler=type(own).from_config(own.config, num_train_timesteps=100))
    for info in scheduler_details(pipeline, compatible_schedulers(pipeline)):
        choices = [(sigmas, None) for sigmas in info.sigmas] + [(None, spacing) for spacing in info.spacings]
        levels = set()
        for sigmas, spacing in choices:
            scheduler = make_scheduler(pipeline, info.name, sigmas, spacing)
            scheduler.set_timesteps(STEPS)
            levels.add((*scheduler.timesteps.tolist(), *getattr(scheduler, "sigmas", torch.empty(0)).tolist()))
        assert len(levels) == len(choices), info.name


def test_at_most_one_kind_of_sigmas_is_on():
    """A choice of sigmas replaces those of the model's config."""
    pipeline = SimpleNamespace(scheduler=MODELS["karras"])
    config = make_scheduler(pipeline, "DPM++ 2M", Sigmas.EXPONENTIAL).config
    assert (config.use_exponential_sigmas, config.use_karras_sigmas, config.use_lu_lambdas) == (True, False, False)
    assert make_scheduler(pipeline, "DPMSolverMultistepScheduler").config.use_karras_sigmas
    assert not make_scheduler(pipeline, "DPM++ 2M").config.use_karras_sigmas
