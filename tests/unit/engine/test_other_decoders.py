"""Pipelines whose decoder is not called `vae`: loaded from a folder, they work like all others."""

import dataclasses

import numpy as np
import pytest
import torch

from calotype_server.engine import assembly, loading
from calotype_server.engine.capabilities import Defaults, decoder, decoder_name, describe
from calotype_server.engine.requests import trial
from calotype_server.errors import ModelUnavailable
from calotype_server.types import Job, PreviewMethod, PreviewOptions, PreviewReady
from support.engine import families
from support.runs import Run


@pytest.mark.parametrize(("family", "name"), [("kandinsky3", "movq"), ("latent_diffusion", "vqvae")])
def test_image_equals_the_plain_call(family, name, tmp_path, monkeypatch):
    """The image equals that of the plain call, every step has a preview, and the last full preview is the image."""
    monkeypatch.setattr(assembly, "describe", lambda *args: dataclasses.replace(describe(*args), width=64, height=64))
    families.prompted(family).save_pretrained(tmp_path / "model")
    pipeline = loading.load_pipeline(loading.LoadOptions(model=str(tmp_path / "model")))
    pipeline.set_progress_bar_config(disable=True)
    trial.check_draws(family, pipeline)
    assert decoder_name(pipeline) == name
    assert decoder(pipeline) is getattr(pipeline, name)
    plain = pipeline(
        prompt="a",
        width=128,
        height=64,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    )[0][0]
    engine = assembly.build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1)
    try:
        assert engine.model.preview_methods == (PreviewMethod.HEAD, PreviewMethod.FULL_VAE)
        assert 64 % engine.model.size_multiple == 0
        options = PreviewOptions(method=PreviewMethod.FULL_VAE, max_edge=128)
        run = Run(engine)
        image = run(Job("a", None, 128, 64, 2, 2.0, 1, engine.model.scheduler, options))
    finally:
        engine.close()
    assert (image.width, image.height) == (128, 64)
    assert image.data == (plain * 255).round().astype("uint8").tobytes()
    previews = [event for event in run.events if isinstance(event, PreviewReady)]
    assert previews[-1].step == 2
    # A final step of DDIM may leave a little noise, which the predicted image does not have.
    shown, drawn = (np.frombuffer(each.data, np.uint8).astype(int) for each in (previews[-1].pixels, image))
    assert shown.shape == drawn.shape
    assert np.abs(shown - drawn).mean() < 3


def test_pipeline_without_a_decoder():
    """A pipeline without a decoder is an error that names its class."""
    with pytest.raises(ModelUnavailable, match="A object has no decoder"):
        decoder_name(object())
