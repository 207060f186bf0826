"""The preview head, its calibration against the pipeline's own decoder, and its place on disk."""

import copy
import dataclasses
import errno
import inspect
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.preview import cache
from calotype_server.engine.preview.cache import cache_path, load_head, save_head
from calotype_server.engine.preview.calibrate import calibrate, decode_planted, multiscale_noise
from calotype_server.engine.preview.head import PreviewHead, to_grid
from calotype_server.engine.view import make_scheduler, request_view
from support import tiny
from support.tiny_inputs import arguments


def seeded(seed=0):
    """A source of the same random numbers each time."""
    return torch.Generator().manual_seed(seed)


def linear_decoder(scale=2, channels=4):
    """A decoder that a head can match: a 3x3 convolution from latents to pixels, mostly within 0 to 1."""
    random = seeded(99)
    weight = 0.02 * torch.randn(3 * scale**2, channels, 3, 3, generator=random)
    bias = 0.5 + 0.05 * torch.randn(3 * scale**2, generator=random)

    def decode(latents):
        padded = functional.pad(latents, (1, 1, 1, 1), mode="replicate")
        return functional.pixel_shuffle(functional.conv2d(padded, weight, bias), scale)

    return decode


def observed(decode, *seeds, noise=0.0, side=16):
    """The statistics of one random picture for each seed."""
    statistics = None
    for seed in seeds:
        random = seeded(seed)
        latents = torch.randn(1, 4, side, side, generator=random)
        images = decode(latents)
        images = images + noise * torch.randn(images.shape, generator=random)
        seen = PreviewHead.observe(2, latents, images)
        statistics = seen if statistics is None else statistics + seen
    return statistics


def error(head, decode):
    """Mean squared error of a head on pictures that it has not seen."""
    latents = torch.randn(1, 4, 16, 16, generator=seeded(1000))
    drawn = head.render(latents, 32, 32).permute(2, 0, 1) / 255
    return float(((drawn - decode(latents)[0].clamp(0, 1)) ** 2).mean())


class TestToGrid:
    """Latents of every layout become (batch, channels, rows, columns)."""

    def test_four_dimensions_stay(self):
        """Ordinary latents keep their shape and values, and become float32."""
        latents = torch.randn(2, 4, 5, 7, generator=seeded()).bfloat16()
        grid = to_grid(latents, 56, 40)
        assert grid.dtype is torch.float32
        assert torch.equal(grid, latents.float())

    def test_frame_axis_goes(self):
        """Latents of a video autoencoder lose their frame axis."""
        latents = torch.randn(2, 4, 1, 5, 7, generator=seeded())
        assert torch.equal(to_grid(latents, 56, 40), latents[:, :, 0])

    @pytest.mark.parametrize(
        ("width", "height", "rows", "columns"),
        [(64, 64, 4, 4), (96, 64, 4, 6), (64, 96, 6, 4), (1024, 16, 1, 64), (48, 112, 7, 3)],
    )
    def test_packed_tokens_unfold(self, width, height, rows, columns):
        """Packed tokens are laid out in rows and columns by the shape of the picture."""
        expected = torch.randn(2, 8, rows, columns, generator=seeded())
        packed = expected.flatten(2).transpose(1, 2)
        assert torch.equal(to_grid(packed, width, height), expected)

    def test_shape_that_does_not_fit_the_tokens_is_rounded(self):
        """A picture's shape that the number of tokens cannot have gives the nearest that it can."""
        assert to_grid(torch.zeros(1, 35, 2), 64, 64).shape == (1, 2, 5, 7)


class TestHead:
    """A head is the least-squares fit of a convolution, and nothing in it is random."""

    def test_linear_decoder_is_recovered(self):
        """Where the decoder is itself such a convolution, the head draws its pictures, to about one grey level."""
        decode = linear_decoder()
        head = PreviewHead(2, observed(decode, *range(8)))
        latents = torch.randn(1, 4, 16, 16, generator=seeded(1000))
        difference = head.render(latents, 32, 32).permute(2, 0, 1) - 255 * decode(latents)[0].clamp(0, 1)
        assert difference.abs().max() < 2.0

    def test_more_observations_lower_the_error(self):
        """With a noisy decoder, sixteen pictures teach more than four, and four more than one."""
        decode = linear_decoder()
        errors = [error(PreviewHead(2, observed(decode, *range(n), noise=0.1)), decode) for n in (1, 4, 16)]
        assert errors[0] > errors[1] > errors[2]

    def test_same_statistics_give_the_same_picture(self):
        """Two heads of equal statistics draw equal bytes."""
        statistics = observed(linear_decoder(), 0, 1)
        latents = torch.randn(1, 4, 16, 16, generator=seeded(7))
        first, second = (PreviewHead(2, statistics).render(latents, 32, 32) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize(
        ("shape", "width", "height"),
        [((1, 4, 6, 9), 72, 48), ((2, 4, 6, 9), 72, 48), ((1, 4, 1, 6, 9), 72, 48), ((1, 54, 4), 72, 48)],
    )
    def test_picture_has_pixels_of_every_cell(self, shape, width, height):
        """Every layout gives rows, columns and RGB bytes: `scale` pixels for each cell of the first latents."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        picture = head.render(torch.randn(shape, generator=seeded()), width, height)
        assert picture.shape == (12, 18, 3)
        assert picture.dtype is torch.uint8

    def test_out_of_range_is_clipped(self):
        """Latents far from any that were seen give black and white, not wrapped bytes."""
        random = seeded()
        latents = torch.randn(1, 1, 8, 8, generator=random)
        head = PreviewHead(1, PreviewHead.observe(1, latents, 0.5 + 0.1 * latents.expand(1, 3, 8, 8)))
        assert head.render(torch.full((1, 1, 4, 4), 100.0), 4, 4).min() == 255
        assert head.render(torch.full((1, 1, 4, 4), -100.0), 4, 4).max() == 0

    def test_render_leaves_the_latents_alone(self):
        """The denoiser goes on with the very latents that are drawn."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        before = latents.clone()
        head.render(latents, 16, 16)
        assert torch.equal(latents, before)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_invalid_numbers_are_left_out(self, poison):
        """A picture of NaN or infinity changes nothing of what a head has learned from the others."""
        decode = linear_decoder()
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        images = decode(latents)
        clean = PreviewHead.observe(2, latents, images)
        bad_latents = PreviewHead.observe(
            2, torch.cat([latents, torch.full_like(latents, poison)]), torch.cat([images, images])
        )
        bad_images = PreviewHead.observe(
            2, torch.cat([latents, latents]), torch.cat([images, torch.full_like(images, poison)])
        )
        for seen in (bad_latents, bad_images):
            assert seen.count == clean.count == 64
            torch.testing.assert_close(seen.inputs, clean.inputs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(seen.products, clean.products, rtol=1e-5, atol=1e-5)

    def test_one_invalid_cell_costs_its_neighbourhood(self):
        """A single NaN takes out the nine cells that look at it, and no more."""
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        images = linear_decoder()(latents)
        latents[0, 1, 4, 4] = float("nan")
        assert PreviewHead.observe(2, latents, images).count == 64 - 9

    def test_statistics_add(self):
        """The statistics of two pictures are the sum of those of each."""
        decode = linear_decoder()
        latents = torch.randn(2, 4, 8, 8, generator=seeded())
        together = PreviewHead.observe(2, latents, decode(latents))
        summed = PreviewHead.observe(2, latents[:1], decode(latents[:1])) + PreviewHead.observe(
            2, latents[1:], decode(latents[1:])
        )
        assert summed.count == together.count == 128
        torch.testing.assert_close(summed.inputs, together.inputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(summed.products, together.products, rtol=1e-5, atol=1e-5)


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


class TestCache:
    """A head is calibrated once for each decoder, and a broken cache only costs time."""

    @pytest.fixture
    def head(self):
        return PreviewHead(2, observed(linear_decoder(), 0, 1))

    def test_round_trip(self, tmp_path, head):
        """A head that was saved draws the same picture after it is loaded."""
        path = tmp_path / "new" / "folder" / "head.safetensors"
        save_head(path, head)
        loaded = load_head(path)
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        assert loaded.scale == head.scale
        assert torch.equal(loaded.render(latents, 16, 16), head.render(latents, 16, 16))
        assert [file.name for file in path.parent.iterdir()] == ["head.safetensors"]

    def test_absent_file_is_no_head(self, tmp_path, logs):
        """Nothing in the cache gives None, and that is nothing to warn about."""
        assert load_head(tmp_path / "head.safetensors") is None
        assert logs == []

    @pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other"])
    def test_damaged_file_is_no_head(self, tmp_path, head, logs, damage):
        """Whatever is wrong with the file, loading gives None and a warning that names it; saving heals it."""
        path = tmp_path / "head.safetensors"
        save_head(path, head)
        whole = path.read_bytes()
        cache_of_something_else = cache.save({"weights": torch.zeros(3)})
        path.write_bytes(
            {"empty": b"", "cut": whole[:-100], "garbage": b"\xff" * 500, "other": cache_of_something_else}[damage]
        )
        assert load_head(path) is None
        assert [(entry["log_level"], entry["path"]) for entry in logs] == [("warning", str(path))]
        save_head(path, head)
        assert load_head(path) is not None

    def test_unwritable_folder_survives(self, tmp_path, head, logs):
        """Where no folder can be made, saving warns and goes on."""
        obstacle = tmp_path / "file"
        obstacle.write_text("not a folder")
        path = obstacle / "heads" / "head.safetensors"
        save_head(path, head)
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert load_head(path) is None

    def test_interrupted_write_leaves_nothing(self, tmp_path, head, logs, monkeypatch):
        """When the disk is full at the last moment there is no file, neither whole nor partial."""

        def full(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(cache.os, "replace", full)
        save_head(tmp_path / "head.safetensors", head)
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert list(tmp_path.iterdir()) == []

    def test_interrupted_write_keeps_the_old_file(self, tmp_path, head, logs, monkeypatch):
        """A head that cannot be replaced stays as it was."""
        path = tmp_path / "head.safetensors"
        save_head(path, head)
        before = path.read_bytes()

        def full(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(cache.os, "replace", full)
        save_head(path, PreviewHead(1, head.statistics))
        assert path.read_bytes() == before

    def test_same_decoder_has_the_same_key(self, tmp_path):
        """Two loads of the same weights share a head."""
        assert cache_path(tmp_path, tiny.build("sd15")) == cache_path(tmp_path, tiny.build("sd15"))

    @pytest.mark.parametrize("place", [0, -1])
    def test_key_follows_the_weights(self, tmp_path, place):
        """A fine-tuned decoder has a head of its own, whichever end of its weights has changed."""
        pipeline = tiny.build("sd15")
        before = cache_path(tmp_path, pipeline)
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.weight.view(-1)[place] += 1e-3
        assert cache_path(tmp_path, pipeline) != before

    def test_key_follows_the_config(self, tmp_path):
        """The same weights with another scale of the latents have a head of their own."""
        pipeline = tiny.build("sd15")
        before = cache_path(tmp_path, pipeline)
        pipeline.vae.register_to_config(scaling_factor=0.5)
        assert cache_path(tmp_path, pipeline) != before

    def test_key_follows_the_pipeline(self, tmp_path):
        """The same decoder behind another pipeline, which may pack latents, has a head of its own."""
        flux, chroma = copy.copy(tiny.shared("flux")), copy.copy(tiny.shared("chroma"))
        chroma.__dict__["vae"] = flux.vae
        assert cache_path(tmp_path, chroma) != cache_path(tmp_path, flux)

    def test_home_is_expanded(self, tmp_path, monkeypatch, sd15):
        """`~` in the folder is the user's home."""
        monkeypatch.setenv("HOME", str(tmp_path))
        path = cache_path(Path("~/cache"), sd15)
        assert path.is_relative_to(tmp_path / "cache")
