"""Fitting a head at load: planted latents, decoded by the pipeline's own tail."""

import copy
import dataclasses
import inspect

import pytest
import torch

from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.preview.calibrate import calibrate, decode_planted, multiscale_noise
from calotype_server.engine.preview.head import to_grid
from calotype_server.engine.view import make_scheduler, request_view
from support import tiny
from support.heads import seeded
from support.tiny_inputs import arguments


class TestMultiscaleNoise:
    """Planted latents look like natural pictures to a decoder."""

    @pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 16, 1, 24, 24), (1, 256, 64), (2, 3, 8, 8)])
    def test_shape_and_variance(self, shape):
        """Every layout comes in its own shape, with unit variance, finite."""
        noise = multiscale_noise(shape, seeded())
        assert noise.shape == shape
        assert torch.isfinite(noise).all()
        assert float(noise.std()) == pytest.approx(1.0, abs=1e-3)

    def test_seed_decides(self):
        """Equal generators give equal latents, other seeds others."""
        assert torch.equal(multiscale_noise((1, 4, 16, 16), seeded(3)), multiscale_noise((1, 4, 16, 16), seeded(3)))
        assert not torch.equal(multiscale_noise((1, 4, 16, 16), seeded(3)), multiscale_noise((1, 4, 16, 16), seeded(4)))

    def test_spectrum_falls(self):
        """Each octave of frequencies holds less power than the one below it, unlike in white noise."""
        noise = multiscale_noise((1, 64, 32, 32), seeded())
        power = torch.fft.fft2(noise).abs().square().mean((0, 1))
        frequency = torch.fft.fftfreq(32).abs() * 32
        radius = torch.maximum(frequency[:, None], frequency[None])
        octaves = [float(power[(radius >= low) & (radius < 2 * low)].mean()) for low in (1, 2, 4, 8)]
        assert octaves == sorted(octaves, reverse=True)
        assert octaves[0] > 20 * octaves[-1]

    def test_packed_tokens_are_neighbours(self):
        """Packed tokens next to each other in the picture are alike, those far apart are not."""
        grid = to_grid(multiscale_noise((1, 256, 64), seeded()), 1, 1)
        near = float((grid[..., 1:] * grid[..., :-1]).mean())
        far = float((grid[..., 8:] * grid[..., :-8]).mean())
        assert near > 0.5
        assert near > 2 * abs(far)


class TestDecodePlanted:
    """The pipeline's own tail decodes what is planted."""

    @staticmethod
    def own_picture(family):
        """The picture of a call with as few steps as possible, and what the scheduler gave for decoding."""
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
        recording.__signature__ = inspect.signature(step)
        call = arguments(family, steps=1, output_type="pt")
        return request_view(pipeline, scheduler)(**call)[0], ends[-1]

    @pytest.mark.parametrize("family", tiny.FAMILIES)
    def test_own_result_gives_the_own_picture(self, family):
        """Planting what the scheduler would return gives the very picture that the pipeline makes of it."""
        picture, latents = self.own_picture(family)
        call = {
            name: value
            for name, value in arguments(family).items()
            if name not in ("num_inference_steps", "output_type")
        }
        decoded, shape = decode_planted(tiny.shared(family), latents, call)
        assert shape == tuple(latents.shape)
        assert float(picture.std()) > 0.05
        torch.testing.assert_close(decoded, picture, rtol=0, atol=1e-6)

    @pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler"])
    def test_second_order_schedulers_work(self, name):
        """Schedulers that need more than one step are given as many, and the picture is still that of the latents."""
        pipeline = tiny.sd15(scheduler=make_scheduler(tiny.shared("sd15"), name))
        call = {"prompt": "", "width": 64, "height": 64, "guidance_scale": 1.0}
        latents = multiscale_noise((1, 4, 8, 8), seeded())
        decoded, _ = decode_planted(pipeline, latents, call)
        expected = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        torch.testing.assert_close(decoded, (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)

    def test_error_of_the_pipeline_comes_out(self, sd15):
        """A call that no number of steps can save raises what the pipeline raised."""
        with pytest.raises(ValueError, match="divisible by 8"):
            decode_planted(sd15, None, {"prompt": "", "width": 60, "height": 60})


CALIBRATED = ["sd15", "sdxl", "sd3", "flux", "flux2_klein", "qwen_image", "lumina2", "sana_sprint", "z_image", "lcm"]


class TestCalibrate:
    """At load, a head is fitted to the pipeline's own decoder."""

    @staticmethod
    def small(pipeline, side=64):
        """A description by which calibration stays cheap."""
        info = describe("tiny", tiny.shared("sd15"), Defaults())
        multiple = describe("tiny", pipeline, Defaults(guidance_scale=1.0)).size_multiple
        return dataclasses.replace(info, width=side, height=side, size_multiple=multiple)

    @pytest.mark.parametrize("family", CALIBRATED)
    def test_same_seed_gives_the_same_head(self, family):
        """Calibration works for the family, and depends on nothing but its seed."""
        pipeline = tiny.prompted(family)
        model = self.small(pipeline)
        first, second = (calibrate(pipeline, model, budget=0.0) for _ in range(2))
        assert torch.isfinite(first.statistics.inputs).all()
        assert first.scale == second.scale
        assert torch.equal(first.statistics.inputs, second.statistics.inputs)
        assert torch.equal(first.statistics.products, second.statistics.products)

    def test_other_seed_gives_another_head(self, sd15):
        """The planted latents come from the seed."""
        model = self.small(sd15)
        first, second = (calibrate(sd15, model, seed=seed, budget=0.0) for seed in (0, 1))
        assert not torch.equal(first.statistics.inputs, second.statistics.inputs)

    @pytest.mark.parametrize(("budget", "pictures"), [(0.0, 4), (float("inf"), 24)])
    def test_budget_decides_how_many_pictures(self, sd15, budget, pictures):
        """Out of time, four pictures must do; otherwise there are twenty-four."""
        head = calibrate(sd15, self.small(sd15, side=32), budget=budget)
        assert head.statistics.count == pictures * 4 * 4

    def test_shared_pipeline_is_not_changed(self, sd15):
        """Calibration runs on views."""
        unet, scheduler, config = sd15.unet, copy.deepcopy(vars(sd15.scheduler)), dict(sd15.config)
        calibrate(sd15, self.small(sd15, side=32), budget=0.0)
        assert sd15.unet is unet
        assert vars(sd15.scheduler).keys() == scheduler.keys()
        assert dict(sd15.config) == config

    @pytest.mark.parametrize(("native", "scale"), [(64, 8), (512, 4), (1024, 2), (4096, 1)])
    def test_preview_of_the_native_size_is_at_most_256_pixels(self, sd15, native, scale):
        """A small model's preview has every pixel; a large one's is reduced to 256 at most, while cells allow it."""
        model = dataclasses.replace(self.small(sd15), width=native, height=native, size_multiple=2)
        assert calibrate(sd15, model, budget=0.0).scale == scale
