"""Only parameters that change the image are accepted: guidance, negative prompt, steps, size and seed."""

import pytest

from calotype_server.engine.capabilities import Defaults, describe, read_guidance
from calotype_server.engine.protocol import Stop
from calotype_server.engine.requests.arguments import call_arguments
from support import models_table
from support.engine import families, tiny
from support.engine.families.trial import job_of, small_engine, without_effect

REPRESENTATIVE = {"flux", "flux_schnell", "qwen_image", "sd15", "z_image"}

# Parameter of the scale, its default, whether a negative prompt can have an effect, and the scale above which it has.
EXPECTED = {
    "flux": ("guidance_scale", 3.5, False, None),
    "flux2": ("guidance_scale", 4.0, False, None),
    "flux2_klein": ("guidance_scale", 4.0, False, 1.0),
    "flux2_klein_distilled": (None, None, False, None),
    "flux_kontext": ("guidance_scale", 3.5, False, None),
    "flux_schnell": (None, None, False, None),
    "hunyuan_image": (None, None, True, None),
    "hunyuan_image_distilled": ("distilled_guidance_scale", 3.25, False, None),
    "ideogram4": ("guidance_scale", 7.0, False, 1.0),
    "krea2": ("guidance_scale", 4.5, True, 0.0),
    "lcm": ("guidance_scale", 8.5, False, None),
    "qwen_image": ("true_cfg_scale", 4.0, True, 1.0),
    "sana_sprint": ("guidance_scale", 4.5, False, None),
    "sd15": ("guidance_scale", 7.5, True, 1.0),
    "sd_guidance_embedded": ("guidance_scale", 7.5, False, None),
    "sd_panorama": ("guidance_scale", 7.5, True, 1.0),
    "z_image": ("guidance_scale", 5.0, True, 0.0),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_guidance_is_read_from_the_pipeline(family):
    """The parameter that sets the guidance, its default, and the negative prompt follow from signature and configs."""
    guidance = read_guidance(families.prompted(family))
    found = (guidance.parameter, guidance.default, guidance.takes_negative_prompt, guidance.threshold)
    assert found == EXPECTED[family]


@pytest.mark.parametrize(
    "family",
    [name if name in REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow) for name in families.ALL],
)
def test_every_accepted_parameter_changes_the_image(family, tmp_path):
    """A parameter that the model accepts has an effect: seed, steps, size, guidance and negative prompt."""
    pipeline = families.prompted(family)
    if models_table.rejection(type(pipeline)) is not None:
        pytest.skip("the service rejects its pipeline")
    with small_engine(pipeline, tmp_path) as engine:
        assert without_effect(engine) == []


@pytest.mark.parametrize("family", ["sd15", "z_image", "qwen_image", "krea2"])
def test_a_negative_prompt_has_no_effect_up_to_the_threshold(family, tmp_path):
    """With the guidance at the threshold, the image is the same with and without a negative prompt."""
    with small_engine(families.prompted(family), tmp_path) as engine:
        threshold = engine.model.negative_prompt_above
        job = job_of(engine.model, guidance_scale=threshold)
        assert draw(engine, job) == draw(engine, job_of(engine.model, guidance_scale=threshold, negative_prompt="no"))


def draw(engine, job):
    """Returns the image of a job."""
    return engine.run(job, lambda _: None, Stop())


class TestArguments:
    """A request's guidance becomes arguments of the pipeline's call."""

    def test_qwen_image_is_guided_without_a_negative_prompt(self):
        """Qwen-Image ignores its guidance without a negative prompt, so it gets a blank one."""
        guidance = read_guidance(tiny.shared("qwen_image"))
        assert guidance.arguments(4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
        assert guidance.arguments(4.0, "blurred") == {"true_cfg_scale": 4.0, "negative_prompt": "blurred"}
        assert guidance.arguments(1.0) == {"true_cfg_scale": 1.0}

    def test_a_schedule_is_stretched_and_scaled(self):
        """A pipeline whose guidance changes from step to step keeps its schedule, for any number of steps."""
        guidance = read_guidance(families.prompted("ideogram4"))
        schedule = guidance.schedule
        assert guidance.arguments(7.0, step_count=48)["guidance_schedule"] == schedule
        halved = guidance.arguments(3.5, step_count=16)
        assert halved == {"guidance_scale": None, "guidance_schedule": (3.5,) * 15 + (1.5,)}
        assert guidance.arguments(5.0) == {"guidance_scale": 5.0, "guidance_schedule": None}

    def test_a_scale_without_effect_is_left_out(self):
        """A pipeline that ignores the guidance gets none."""
        pipeline = families.prompted("flux_schnell")
        model = describe("tiny", pipeline, Defaults())
        assert "guidance_scale" not in call_arguments(pipeline, job_of(model, guidance_scale=3.5))


def test_a_default_without_effect_is_ignored_with_a_warning(logs):
    """If the operator sets a default guidance for a model that ignores it, the log says so."""
    model = describe("tiny", families.prompted("flux_schnell"), Defaults(guidance_scale=3.5))
    assert model.guidance_scale is None
    assert [entry["log_level"] for entry in logs if "guidance_scale" in entry] == ["warning"]


def test_an_operators_default_sets_the_guidance():
    """The operator's default replaces the pipeline's, whatever its parameter is called."""
    assert describe("tiny", tiny.shared("qwen_image"), Defaults(guidance_scale=2.5)).guidance_scale == 2.5
