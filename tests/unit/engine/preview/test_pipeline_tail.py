"""The tail of a pipeline decodes given latents as the pipeline does, without denoising."""

import inspect

import pytest
import torch

from calotype_server.engine.capabilities import denoiser_name
from calotype_server.engine.preview.calibrate import multiscale_noise
from calotype_server.engine.preview.pipeline_tail import PipelineTail
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from support.engine import tiny
from support.engine.heads import seeded
from support.engine.tiny_inputs import arguments

# A second size; the shape shows whether width and height are confused.
SIZES = {"lumina2": (64, 32), "sana": (128, 64), "sana_sprint": (128, 64)}


def own_pictures(family, **others):
    """Returns the pipeline's image after as few steps as possible, and the scheduler's result that it decoded."""
    pipeline = tiny.shared(family)
    scheduler = make_scheduler(pipeline, type(pipeline.scheduler).__name__)
    step, ends = scheduler.step, []

    def recording(*args, return_dict=True, **kwargs):
        output = step(*args, return_dict=True, **kwargs)
        # Consistency models decode their x0, the others what follows the last step.
        named = "denoised" if hasattr(output, "denoised") else "prev_sample"
        named = "pred_original_sample" if family == "sana_sprint" else named
        ends.append(getattr(output, named))
        return output if return_dict else output.to_tuple()

    scheduler.step = recording
    # The pipelines look for `generator` among the parameters.
    recording.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    call = arguments(family, steps=1, output_type="pt", **others)
    return request_view(pipeline, scheduler)(**call)[0], ends[-1], (call["width"], call["height"])


@pytest.fixture(scope="module")
def tails():
    """One tail per family: in the product, a tail decodes many images of several sizes."""
    made = {}
    return lambda family: made.setdefault(family, PipelineTail(tiny.prompted(family)))


@pytest.mark.parametrize("size", ["own", "second"])
@tiny.every_family
def test_the_image_is_the_pipelines_own(family, size, tails):
    """Decoding the scheduler's result gives the pipeline's image, bit for bit."""
    second = dict(zip(("width", "height"), SIZES.get(family, (96, 64)), strict=True))
    picture, latents, (width, height) = own_pictures(family, **(second if size == "second" else {}))
    assert tails(family).shape(width, height) == tuple(latents.shape)
    assert float(picture.std()) > 0.05
    assert torch.equal(tails(family).decode(latents, width, height), picture)


@tiny.every_family
def test_a_batch_gives_one_image_per_latent(family, tails):
    """Several latents at once give the image of each, in order, even if the pipeline supports one only."""
    _, latents, (width, height) = own_pictures(family)
    others = torch.randn(2, *latents.shape[1:], generator=seeded(3))
    batch = torch.cat([others[:1], latents, others[1:]])
    together = tails(family).decode(batch, width, height)
    alone = torch.cat([tails(family).decode(one, width, height) for one in batch.split(1)])
    assert together.shape == (3, 3, height, width)
    # Convolutions sum in another order for a batch.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"])
@pytest.mark.parametrize("count", [1, 2])
def test_second_order_schedulers_work(name, count):
    """With schedulers that need more than one step, the images are still those of the given latents."""
    pipeline = tiny.sd15(scheduler=make_scheduler(tiny.shared("sd15"), name))
    latents = multiscale_noise((count, 4, 8, 8), seeded())
    expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    decoded = PipelineTail(pipeline).decode(latents, 64, 64)
    torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_prompt_and_denoiser_are_computed_once():
    """The prompt is encoded once, and the denoiser is called once for each size."""
    pipeline = tiny.build("sd15")
    calls = {"denoiser": 0, "text": 0, "vae": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    getattr(pipeline, denoiser_name(pipeline)).register_forward_pre_hook(count("denoiser"))
    pipeline.text_encoder.register_forward_pre_hook(count("text"))
    pipeline.vae.decoder.register_forward_pre_hook(count("vae"))
    tail = PipelineTail(pipeline)
    for _ in range(3):
        tail.decode(torch.zeros(1, 4, 8, 8), 64, 64)
        tail.decode(torch.zeros(1, 4, 4, 8), 64, 32)
    assert calls == {"denoiser": 2, "text": 1, "vae": 6}


def test_many_sizes_cost_one_denoiser_call_each(sd15):
    """Many sizes in turn do not call the denoiser for every preview."""
    calls = []
    handle = sd15.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    tail = PipelineTail(sd15)
    for _ in range(2):
        for columns in range(2, 10):
            tail.decode(torch.zeros(1, 4, 2, columns), 8 * columns, 16)
    handle.remove()
    assert len(calls) == 8


def test_the_shared_pipeline_is_not_changed(sd15):
    """A tail does not change the shared pipeline."""
    parts, config = dict(sd15.components), dict(sd15.config)
    scheduler = vars(sd15.scheduler).keys()
    PipelineTail(sd15, vae=tiny.build("sd15").vae).decode(torch.zeros(1, 4, 8, 8), 64, 64)
    assert all(sd15.components[name] is part for name, part in parts.items())
    assert dict(sd15.config) == config
    assert vars(sd15.scheduler).keys() == scheduler


def test_an_error_of_the_pipeline_is_raised(sd15):
    """If the call fails with every number of steps, the pipeline's exception is raised."""
    with pytest.raises(ValueError, match="divisible by 8"):
        PipelineTail(sd15).decode(torch.zeros(1, 4, 8, 8), 60, 60)
