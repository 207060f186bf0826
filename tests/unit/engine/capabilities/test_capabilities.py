"""Capabilities and defaults of a model, read from its pipeline."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from calotype_server.engine.capabilities import Defaults, describe, read_defaults, tokenizers
from calotype_server.engine.capabilities.schedulers import compatible_schedulers, scheduler_details
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.flow import FLOW_SCHEDULERS
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.errors import ModelUnavailable
from calotype_server.types import Sigmas
from support.engine import tiny
from support.engine.tiny_inputs import arguments

# Native side, size multiple, guidance by default, negative prompt, steps by default.
# Pipelines whose config holds no size have a native one of 1024 in their own code.
EXPECTED = {
    "aura_flow": (64, 16, 3.5, True, 50),
    "chroma": (1024, 16, 5.0, True, 35),
    "cogview4": (1024, 16, 5.0, True, 50),
    "flux": (1024, 16, 3.5, False, 28),
    "flux2_klein": (1024, 16, 4.0, False, 50),
    "lcm": (64, 8, 8.5, False, 4),
    "lumina2": (32, 16, 4.0, True, 30),
    "pixart_sigma": (64, 16, 4.5, True, 20),
    "qwen_image": (1024, 16, 4.0, True, 50),
    "sana": (256, 32, 4.5, True, 20),
    "sana_sprint": (256, 32, 4.5, False, 2),
    "sd15": (64, 8, 7.5, True, 50),
    "sd3": (64, 16, 7.0, True, 28),
    "sdxl": (64, 8, 5.0, True, 50),
    "z_image": (1024, 16, 5.0, True, 50),
}

EPSILON_SCHEDULERS = [
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]


def model_of(pipeline, defaults=None):
    """Describes a pipeline, with the defaults of its class unless others are given."""
    return describe("tiny", pipeline, defaults or Defaults())


@pytest.fixture(scope="module", autouse=True)
def _schedulers_examined_once():
    """Nothing: these tests are about that examination."""


@pytest.fixture(scope="module")
def offered():
    """The schedulers offered for the tiny SD1.5."""
    return model_of(tiny.shared("sd15")).schedulers


def test_every_family_is_expected():
    """The table covers every family."""
    assert set(EXPECTED) == set(tiny.FAMILIES)


@tiny.every_family
def test_family_is_described(family):
    """Sizes, guidance, negative prompt and steps come from the pipeline."""
    pipeline = tiny.shared(family)
    model = model_of(pipeline)
    side, multiple, guidance, negative, steps = EXPECTED[family]
    assert (model.width, model.height, model.size_multiple) == (side, side, multiple)
    assert model.guidance_scale == guidance
    assert model.takes_negative_prompt is negative
    assert model.step_count == steps
    assert (model.name, model.pipeline) == ("tiny", type(pipeline).__name__)
    assert (model.device, model.dtype) == ("cpu", "float32")
    assert model.scheduler in model.schedulers


@tiny.every_family
def test_multiples_of_the_size_are_generated_exactly(family):
    """An image whose sides are any multiples, even or odd, has exactly the requested size."""
    multiple = EXPECTED[family][1]
    width, height = (factor * multiple for factor in (5, 3))
    call = arguments(family, width=width, height=height, steps=1, output_type="pt")
    assert tiny.shared(family)(**call)[0].shape == (1, 3, height, width)


@pytest.mark.parametrize("family", ["flux", "sd3", "lumina2", "sd15"])
def test_the_multiple_is_as_small_as_possible(family):
    """Between two multiples a pipeline rejects the size, fails, or generates another size."""
    multiple = EXPECTED[family][1]
    call = arguments(family, width=3 * multiple + multiple // 2, height=3 * multiple, steps=1, output_type="pt")
    try:
        drawn = tiny.shared(family)(**call)[0].shape
    except (ValueError, RuntimeError):
        return
    assert drawn != (1, 3, call["height"], call["width"])


def test_sizes_need_not_be_square(sd15):
    """A native size with two numbers is height and width."""
    unet = SimpleNamespace(
        config=FrozenDict(sample_size=(8, 16), time_cond_proj_dim=None),
        device=sd15.unet.device,
        dtype=sd15.unet.dtype,
        __class__=object,
    )
    pipeline = request_view(sd15, sd15.scheduler, unet=unet, default_sample_size=None)
    model = model_of(pipeline)
    assert (model.width, model.height) == (128, 64)


class TestSchedulers:
    """Only schedulers that work with the model are offered."""

    def test_epsilon_model(self, sd15, offered):
        """A model that predicts noise gets all schedulers that expect noise, sorted; those of EDM are excluded."""
        assert list(offered) == sorted(offered)
        assert "EDMEulerScheduler" in {kind.__name__ for kind in sd15.scheduler.compatibles}
        assert set(offered) == set(EPSILON_SCHEDULERS)

    @pytest.mark.parametrize("steps", [1, 2, 4])
    @pytest.mark.parametrize("name", EPSILON_SCHEDULERS)
    @pytest.mark.filterwarnings("ignore:Should have:UserWarning")
    def test_every_offered_scheduler_works(self, sd15, offered, name, steps):
        """Every offered scheduler gives a finite image, also with few steps."""
        assert name in offered
        picture = request_view(sd15, make_scheduler(sd15, name))(**arguments("sd15", steps=steps, output_type="pt"))[0]
        assert torch.isfinite(picture).all()
        assert float(picture.std()) > 0.01

    @pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
    def test_other_predictions(self, prediction_type):
        """The offered schedulers depend on the prediction type, because some do not support every type."""
        scheduler = diffusers.DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
        pipeline = tiny.build("sd15", scheduler=scheduler)
        offered = set(model_of(pipeline).schedulers)
        assert {"DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"} <= offered
        assert ("EulerAncestralDiscreteScheduler" in offered) == (prediction_type == "v_prediction")
        assert ("KDPM2DiscreteScheduler" in offered) == (prediction_type == "v_prediction")
        assert "EDMEulerScheduler" not in offered
        for name in sorted(offered):
            result = request_view(pipeline, make_scheduler(pipeline, name))(**arguments("sd15", steps=4))[0]
            assert torch.isfinite(result).all(), name

    @pytest.mark.parametrize("family", ["flux", "sd3", "cogview4", "z_image"])
    def test_flow_model(self, family):
        """A flow model gets all schedulers for flow models, even if its own needs the size of the image."""
        assert model_of(tiny.shared(family)).schedulers == tuple(sorted(FLOW_SCHEDULERS))

    @pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True}])
    def test_schedulers_that_clip_are_not_offered(self, config):
        """A scheduler that would not end at x0 with the model's config is not offered, except the model's own."""
        own = diffusers.DDIMScheduler(**{"clip_sample": False, **config})
        offered = set(compatible_schedulers(SimpleNamespace(scheduler=own)))
        assert {"DDIMScheduler", "EulerDiscreteScheduler"} <= offered
        assert "DDPMScheduler" not in offered

    def test_others_do_not_clip(self):
        """If the model's own scheduler has no option to clip, the others do not clip."""
        own = diffusers.EulerDiscreteScheduler()
        for name in ("DDIMScheduler", "DDPMScheduler"):
            assert make_scheduler(SimpleNamespace(scheduler=own), name).config.clip_sample is False
            assert name in compatible_schedulers(SimpleNamespace(scheduler=own))

    def test_others_have_the_noise_of_the_model(self):
        """Another class gets the model's betas, even if they are the defaults of the own class and not its own."""
        own = diffusers.DPMSolverMultistepScheduler()
        for name in compatible_schedulers(SimpleNamespace(scheduler=own)):
            made = make_scheduler(SimpleNamespace(scheduler=own), name)
            torch.testing.assert_close(made.alphas_cumprod, own.alphas_cumprod, msg=name)

    def test_a_missing_package_removes_its_choices(self, sd15, monkeypatch):
        """Without scipy, BETA sigmas are not offered."""
        details = scheduler_details(sd15, ("EulerDiscreteScheduler",))
        assert Sigmas.BETA in details[0].sigmas
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
        (info,) = scheduler_details(sd15, ("EulerDiscreteScheduler",))
        assert info.sigmas == (Sigmas.KARRAS, Sigmas.EXPONENTIAL)
        assert info.aliases == ("Euler", "Euler Karras")

    def test_largest_numbers_of_steps(self, sd15):
        """Each scheduler accepts the reported number of steps, and no more."""
        for pipeline, own in ((sd15, 1000), (tiny.shared("lcm"), 50)):
            most = model_of(pipeline).max_step_counts
            assert most[type(pipeline.scheduler).__name__] == own
            for name, count in most.items():
                make_scheduler(pipeline, name).set_timesteps(count)
        with pytest.raises(ValueError, match="num_inference_steps"):
            make_scheduler(tiny.shared("lcm"), "LCMScheduler").set_timesteps(51)

    def test_own_scheduler_is_always_offered(self):
        """The model's own scheduler is offered even if it is of an unknown kind."""
        assert model_of(tiny.shared("sana_sprint")).schedulers == ("SCMScheduler",)

    def test_description_leaves_the_pipeline_alone(self, sd15):
        """Trying the schedulers does not change the pipeline's own."""
        before = sd15.scheduler
        values = dict(vars(before))
        model_of(sd15)
        assert sd15.scheduler is before
        assert vars(before).keys() == values.keys()
        assert all(vars(before)[name] is value for name, value in values.items())


class TestDefaults:
    """Settings override `calotype.json`, which overrides the defaults in the pipeline's signature."""

    def test_given_values_take_precedence(self, sd15):
        """Given values replace the defaults of the class."""
        model = model_of(sd15, Defaults(step_count=12, guidance_scale=0.0))
        assert model.step_count == 12
        assert model.guidance_scale == 0.0

    def test_guidance_needs_a_parameter(self):
        """A pipeline without a guidance parameter has no guidance, even if the defaults name one."""

        class Unguided(diffusers.StableDiffusionPipeline):
            def __call__(self, prompt=None, height=None, width=None, num_inference_steps=8):
                raise NotImplementedError

        pipeline = request_view(tiny.shared("sd15"), tiny.shared("sd15").scheduler)
        pipeline.__class__ = Unguided
        model = model_of(pipeline, Defaults(guidance_scale=4.0))
        assert model.guidance_scale is None
        assert not model.takes_negative_prompt
        assert model.step_count == 8

    def test_or_else(self):
        """Each missing value comes from the other defaults; zero counts as a value."""
        assert Defaults(5, None).or_else(Defaults(9, 2.0)) == Defaults(5, 2.0)
        assert Defaults(None, 0.0).or_else(Defaults(9, 2.0)) == Defaults(9, 0.0)
        assert Defaults().or_else(Defaults()) == Defaults()

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ({"step_count": 20, "guidance_scale": 3.0}, Defaults(20, 3.0)),
            ({"step_count": 20}, Defaults(20, None)),
            ({"guidance_scale": 3}, Defaults(None, 3)),
            ({}, Defaults()),
            ({"about": "something else"}, Defaults()),
        ],
    )
    def test_file_is_read(self, tmp_path, content, expected):
        """The file may have any of the values; unknown keys are ignored."""
        (tmp_path / "calotype.json").write_text(json.dumps(content))
        assert read_defaults(tmp_path) == expected

    def test_tiny_vae_is_a_path_from_the_file(self, tmp_path):
        """A model folder may contain a small decoder for previews."""
        (tmp_path / "calotype.json").write_text(json.dumps({"tiny_vae": "small"}))
        assert read_defaults(tmp_path) == Defaults(tiny_vae=str(tmp_path / "small"))
        assert Defaults(tiny_vae="mine").or_else(Defaults(tiny_vae="its")).tiny_vae == "mine"
        assert Defaults().or_else(Defaults(tiny_vae="its")).tiny_vae == "its"

    def test_no_file_is_no_defaults(self, tmp_path):
        """Without a file there are no defaults."""
        assert read_defaults(tmp_path) == Defaults()
        assert read_defaults(tmp_path / "not" / "there") == Defaults()

    @pytest.mark.parametrize(
        "content",
        [
            "{not json",
            "[]",
            '{"step_count": "many"}',
            '{"step_count": 0}',
            '{"guidance_scale": NaN}',
            '{"tiny_vae": 1}',
        ],
    )
    def test_a_damaged_file_is_reported(self, tmp_path, content):
        """An invalid file gives an error with its name, without a stack trace."""
        (tmp_path / "calotype.json").write_text(content)
        with pytest.raises(ModelUnavailable, match=r"calotype\.json"):
            read_defaults(tmp_path)


class TestTokenizers:
    """The number of prompt tokens that a model reads."""

    @staticmethod
    def limits(family, **lengths):
        """Returns the limits of a pipeline whose tokenizers have the given lengths."""
        pipeline = tiny.shared(family)
        replaced = {name: SimpleNamespace(model_max_length=length) for name, length in lengths.items()}
        return [limit for _, limit in tokenizers(request_view(pipeline, pipeline.scheduler, **replaced))]

    def test_clip(self, sd15):
        """The limit of CLIP is 77 tokens."""
        assert tokenizers(sd15) == [(sd15.tokenizer, 77)]
        assert model_of(sd15).max_prompt_tokens == 77

    def test_longest_counts(self):
        """With CLIP and T5 the limit is T5's, as set by the pipeline."""
        assert self.limits("sd3", tokenizer=77, tokenizer_2=77, tokenizer_3=512)[0] == 77
        assert max(self.limits("sd3", tokenizer=77, tokenizer_2=77, tokenizer_3=512)) == 256
        assert max(self.limits("flux", tokenizer=77, tokenizer_2=512)) == 512

    @pytest.mark.parametrize(("family", "limit"), [("z_image", 512), ("pixart_sigma", 300), ("sana", 300)])
    def test_language_model(self, family, limit):
        """A tokenizer without its own limit has that of the pipeline."""
        assert self.limits(family, tokenizer=10**30) == [limit]

    def test_no_limit_is_unknown(self):
        """If neither tokenizer nor pipeline has a limit, none is reported."""
        pipeline = tiny.shared("sd15")
        view = request_view(pipeline, pipeline.scheduler, tokenizer=SimpleNamespace(model_max_length=10**30))
        assert tokenizers(view) == []
        assert model_of(view).max_prompt_tokens == 0

    def test_no_tokenizer_is_unknown(self):
        """A pipeline without a tokenizer has no limit."""
        assert model_of(tiny.shared("flux")).max_prompt_tokens == 0
