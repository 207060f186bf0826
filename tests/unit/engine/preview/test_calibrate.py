"""Fitting a head at load to synthetic latents, decoded by the pipeline's own tail."""

import copy
import dataclasses

import pytest
import torch

from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.preview.calibrate import calibrate, multiscale_noise
from calotype_server.engine.preview.head import to_grid
from support.engine import tiny
from support.engine.heads import seeded


class TestMultiscaleNoise:
    """Synthetic latents have the statistics of natural images."""

    @pytest.mark.parametrize(
        "shape", [(1, 4, 32, 32), (1, 16, 1, 24, 24), (1, 1, 24, 24, 16), (1, 256, 64), (2, 3, 8, 8)]
    )
    def test_shape_and_variance(self, shape):
        """Every layout has the requested shape, unit variance and finite values."""
        noise = multiscale_noise(shape, seeded())
        assert noise.shape == shape
        assert torch.isfinite(noise).all()
        assert float(noise.std()) == pytest.approx(1.0, abs=1e-3)

    def test_the_seed_determines_the_latents(self):
        """Equal seeds give equal latents, and other seeds give other latents."""
        assert torch.equal(multiscale_noise((1, 4, 16, 16), seeded(3)), multiscale_noise((1, 4, 16, 16), seeded(3)))
        assert not torch.equal(multiscale_noise((1, 4, 16, 16), seeded(3)), multiscale_noise((1, 4, 16, 16), seeded(4)))

    def test_spectrum_falls(self):
        """Each octave of frequencies has less power than the one below it, unlike white noise."""
        noise = multiscale_noise((1, 64, 32, 32), seeded())
        power = torch.fft.fft2(noise).abs().square().mean((0, 1))
        frequency = torch.fft.fftfreq(32).abs() * 32
        radius = torch.maximum(frequency[:, None], frequency[None])
        octaves = [float(power[(radius >= low) & (radius < 2 * low)].mean()) for low in (1, 2, 4, 8)]
        assert octaves == sorted(octaves, reverse=True)
        assert octaves[0] > 20 * octaves[-1]

    def test_neighbouring_tokens_are_similar(self):
        """Packed tokens that are neighbours in the image are similar; distant ones are not."""
        grid = to_grid(multiscale_noise((1, 256, 64), seeded()), 1, 1)
        near = float((grid[..., 1:] * grid[..., :-1]).mean())
        far = float((grid[..., 8:] * grid[..., :-8]).mean())
        assert near > 0.5
        assert near > 2 * abs(far)


CALIBRATED = ["sd15", "sdxl", "sd3", "flux", "flux2_klein", "qwen_image", "lumina2", "sana_sprint", "z_image", "lcm"]


class TestCalibrate:
    """The head is fitted to the pipeline's own decoder."""

    @staticmethod
    def small(pipeline, side=64):
        """Returns a model description with which calibration is fast."""
        info = describe("tiny", tiny.shared("sd15"), Defaults())
        multiple = describe("tiny", pipeline, Defaults(guidance_scale=1.0)).size_multiple
        return dataclasses.replace(info, width=side, height=side, size_multiple=multiple)

    @pytest.mark.parametrize("family", CALIBRATED)
    def test_same_seed_gives_the_same_head(self, family):
        """Calibration works for the family, and its result depends only on the seed."""
        pipeline = tiny.prompted(family)
        model = self.small(pipeline)
        first, second = (calibrate(pipeline, model, budget=0.0) for _ in range(2))
        assert torch.isfinite(first.calibration.inputs).all()
        assert first.scale == second.scale
        assert torch.equal(first.calibration.inputs, second.calibration.inputs)
        assert torch.equal(first.calibration.products, second.calibration.products)

    def test_other_seed_gives_another_head(self, sd15):
        """Another seed gives other synthetic latents."""
        model = self.small(sd15)
        first, second = (calibrate(sd15, model, seed=seed, budget=0.0) for seed in (0, 1))
        assert not torch.equal(first.calibration.inputs, second.calibration.inputs)

    @pytest.mark.parametrize(("budget", "images"), [(0.0, 4), (float("inf"), 24)])
    def test_the_budget_determines_the_number_of_images(self, sd15, budget, images):
        """Without time left four images are used, otherwise twenty-four."""
        head = calibrate(sd15, self.small(sd15, side=32), budget=budget)
        assert head.calibration.count == images * 4 * 4

    def test_shared_pipeline_is_not_changed(self, sd15):
        """Calibration does not change the shared pipeline."""
        unet, scheduler, config = sd15.unet, copy.deepcopy(vars(sd15.scheduler)), dict(sd15.config)
        calibrate(sd15, self.small(sd15, side=32), budget=0.0)
        assert sd15.unet is unet
        assert vars(sd15.scheduler).keys() == scheduler.keys()
        assert dict(sd15.config) == config

    @pytest.mark.parametrize(("native", "scale"), [(64, 8), (512, 4), (1024, 2), (4096, 1)])
    def test_preview_of_the_native_size_is_at_most_256_pixels(self, sd15, native, scale):
        """A small model's preview has full size; that of a large model has at most 256 pixels, or one per cell."""
        model = dataclasses.replace(self.small(sd15), width=native, height=native, size_multiple=2)
        assert calibrate(sd15, model, budget=0.0).scale == scale
