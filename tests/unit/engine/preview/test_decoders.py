"""The full VAE decodes previews exactly as the pipeline does, and a tiny VAE can replace it."""

import dataclasses

import pytest
import torch

from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.preview.decoders import VaeDecoder
from calotype_server.engine.requests.view import request_view
from calotype_server.engine.schedulers.make import make_scheduler
from calotype_server.engine.tap import StepTap
from calotype_server.types import PreviewMethod, PreviewOptions, PreviewReady
from support.engine import tiny
from support.engine.tiny_unets import tiny_vae
from support.runs import JOB, STEPS, Run


def seeded_tiny_vae(channels=4):
    """Returns a small decoder with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_vae(channels).eval()


def predictions(pipeline, job):
    """Returns the predicted x0 of each step of a job."""
    scheduler = make_scheduler(pipeline, job.scheduler)
    found = []
    StepTap(
        scheduler,
        on_start=lambda _: None,
        on_step=lambda step: found.append(step.x0()),
        should_stop=lambda: False,
    )
    request_view(pipeline, scheduler)(
        prompt=job.prompt,
        width=job.width,
        height=job.height,
        num_inference_steps=job.step_count,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator().manual_seed(job.seed),
        output_type="latent",
    )
    return found


def drawn(engine, job):
    """Returns the pixels of each preview by step, at least of the last step."""
    run = Run(engine)
    run(job)
    shown = {event.step: event for event in run.events if isinstance(event, PreviewReady)}
    assert {event.method for event in shown.values()} == {job.preview.method}
    assert max(shown) == STEPS
    return {step: event.pixels for step, event in shown.items()}


def as_bytes(picture):
    """Returns the pixels of one image, (3, height, width), -1 to 1, rounded as diffusers does."""
    return (
        ((picture / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy().tobytes()
    )


def job_of(pipeline, method):
    """Returns a job whose previews all use one method."""
    return dataclasses.replace(
        JOB,
        width=64,
        height=64,
        scheduler=type(pipeline.scheduler).__name__,
        preview=PreviewOptions(method=method),
    )


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
@torch.no_grad()
def test_the_full_vae_decodes_as_the_pipeline_does(family, tmp_path):
    """Each preview equals the pipeline's own decoding of the step's predicted x0."""
    pipeline = tiny.prompted(family)
    engine = build_engine(
        "tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1, preview_methods={PreviewMethod.FULL_VAE}
    )
    job = job_of(pipeline, PreviewMethod.FULL_VAE)
    config = pipeline.vae.config
    truth = predictions(pipeline, job)
    for step, pixels in drawn(engine, job).items():
        latents = truth[step - 1] / config.scaling_factor + (config.get("shift_factor") or 0.0)
        assert pixels.data == as_bytes(pipeline.vae.decode(latents).sample[0])
    engine.close()


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
@torch.no_grad()
def test_a_tiny_vae_replaces_the_full_one(family, tmp_path):
    """Each preview equals the small decoder's image of x0 in the denoiser's scale."""
    pipeline, vae = tiny.prompted(family), seeded_tiny_vae()
    engine = build_engine(
        "tiny",
        pipeline,
        defaults=Defaults(),
        cache_dir=tmp_path,
        threads=1,
        preview_methods={PreviewMethod.TINY_VAE},
        tiny_vae=vae,
    )
    assert engine.model.preview_methods == (PreviewMethod.TINY_VAE,)
    job = job_of(pipeline, PreviewMethod.TINY_VAE)
    truth = predictions(pipeline, job)
    for step, pixels in drawn(engine, job).items():
        assert pixels.data == as_bytes(vae.decode(truth[step - 1]).sample[0])
    engine.close()


def test_a_tiny_vae_that_does_not_fit_is_not_offered(tmp_path, logs):
    """A tiny VAE that raises at load is not offered, which is logged; the other methods work."""
    engine = build_engine(
        "tiny",
        tiny.build("sd15"),
        defaults=Defaults(),
        cache_dir=tmp_path,
        threads=1,
        preview_methods={PreviewMethod.TINY_VAE, PreviewMethod.FULL_VAE},
        tiny_vae=seeded_tiny_vae(channels=16),
    )
    engine.close()
    assert engine.model.preview_methods == (PreviewMethod.FULL_VAE,)
    assert [entry["method"] for entry in logs if entry["log_level"] == "error"] == [PreviewMethod.TINY_VAE]


def test_images_of_a_batch_are_in_order(sd15):
    """The images of a batch are in the order of the latents."""
    decoder = VaeDecoder(sd15, seeded_tiny_vae())
    latents = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(1))
    assert decoder.shape(64, 32) == (1, 4, 4, 8)
    together = decoder.decode(latents, 64, 32)
    for picture, one in zip(together, latents.split(1), strict=True):
        torch.testing.assert_close(picture, decoder.decode(one, 64, 32)[0], rtol=0, atol=1e-5)
