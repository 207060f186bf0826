"""The preview head: fitting, decoding, and learning from finished images."""

import pytest
import torch

from calotype_server.engine.preview.head import PreviewHead, to_grid
from support.engine.heads import error, linear_decoder, observed, seeded


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

    def test_channels_move_to_the_front(self):
        """Latents with a frame axis and the channels last, as those of Kandinsky 5, get the order of all others."""
        latents = torch.randn(2, 1, 5, 7, 4, generator=seeded())
        assert torch.equal(to_grid(latents, 56, 40), latents[:, 0].permute(0, 3, 1, 2))

    @pytest.mark.parametrize(
        ("width", "height", "rows", "columns"),
        [(64, 64, 4, 4), (96, 64, 4, 6), (64, 96, 6, 4), (1024, 16, 1, 64), (48, 112, 7, 3)],
    )
    def test_packed_tokens_unfold(self, width, height, rows, columns):
        """The aspect ratio of the image gives the rows and columns of packed tokens."""
        expected = torch.randn(2, 8, rows, columns, generator=seeded())
        packed = expected.flatten(2).transpose(1, 2)
        assert torch.equal(to_grid(packed, width, height), expected)

    def test_shape_that_does_not_fit_the_tokens_is_rounded(self):
        """If the number of tokens does not fit the aspect ratio, the nearest possible layout is used."""
        assert to_grid(torch.zeros(1, 35, 2), 64, 64).shape == (1, 2, 5, 7)


class TestHead:
    """A head is the least-squares fit of a convolution, without randomness."""

    def test_linear_decoder_is_recovered(self):
        """If the decoder is such a convolution itself, the head's images differ by about one grey level."""
        decode = linear_decoder()
        head = PreviewHead(2, observed(decode, *range(8)))
        latents = torch.randn(1, 4, 16, 16, generator=seeded(1000))
        difference = head.decode(latents, 32, 32) - decode(latents).clamp(0, 1)
        assert difference.abs().max() < 0.008

    def test_more_observations_lower_the_error(self):
        """With a noisy decoder, the error falls from one to four to sixteen images."""
        decode = linear_decoder()
        errors = [error(PreviewHead(2, observed(decode, *range(n), noise=0.1)), decode) for n in (1, 4, 16)]
        assert errors[0] > errors[1] > errors[2]

    def test_same_statistics_give_the_same_image(self):
        """Two heads with equal statistics decode to equal images."""
        statistics = observed(linear_decoder(), 0, 1)
        latents = torch.randn(1, 4, 16, 16, generator=seeded(7))
        first, second = (PreviewHead(2, statistics).decode(latents, 32, 32) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize(
        ("shape", "width", "height"),
        [((1, 4, 6, 9), 72, 48), ((2, 4, 6, 9), 72, 48), ((1, 4, 1, 6, 9), 72, 48), ((1, 54, 4), 72, 48)],
    )
    def test_the_image_has_pixels_of_every_cell(self, shape, width, height):
        """Every layout gives one image per entry of the batch, with `scale` pixels per cell."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        pictures = head.decode(torch.randn(shape, generator=seeded()), width, height)
        assert pictures.shape == (shape[0], 3, 12, 18)
        assert pictures.min() >= 0
        assert pictures.max() <= 1

    def test_out_of_range_is_clipped(self):
        """Values out of range are clipped to black and white."""
        random = seeded()
        latents = torch.randn(1, 1, 8, 8, generator=random)
        head = PreviewHead(1, PreviewHead.observe(1, latents, 0.5 + 0.1 * latents.expand(1, 3, 8, 8)))
        assert head.decode(torch.full((1, 1, 4, 4), 100.0), 4, 4).min() == 1
        assert head.decode(torch.full((1, 1, 4, 4), -100.0), 4, 4).max() == 0

    def test_decoding_leaves_the_latents_alone(self):
        """Decoding does not change the latents, which the denoiser still uses."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        before = latents.clone()
        head.decode(latents, 16, 16)
        assert torch.equal(latents, before)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_invalid_numbers_are_left_out(self, poison):
        """An image with NaN or infinity does not change the statistics."""
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
        """A single NaN excludes the nine cells that use it, and no more."""
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        images = linear_decoder()(latents)
        latents[0, 1, 4, 4] = float("nan")
        assert PreviewHead.observe(2, latents, images).count == 64 - 9

    def test_statistics_add(self):
        """The statistics of two images are the sum of the statistics of each."""
        decode = linear_decoder()
        latents = torch.randn(2, 4, 8, 8, generator=seeded())
        together = PreviewHead.observe(2, latents, decode(latents))
        summed = PreviewHead.observe(2, latents[:1], decode(latents[:1])) + PreviewHead.observe(
            2, latents[1:], decode(latents[1:])
        )
        assert summed.count == together.count == 128
        torch.testing.assert_close(summed.inputs, together.inputs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(summed.products, together.products, rtol=1e-5, atol=1e-5)


class TestLearning:
    """The head learns from finished images."""

    @staticmethod
    def other_decoder():
        """Returns a decoder that the head was not calibrated for."""
        decode = linear_decoder()
        return lambda latents: 0.3 + 0.5 * decode(latents.flip(1))

    def test_a_learned_image_is_decoded_better(self):
        """Learning from an image lowers the error on that image."""
        decode = self.other_decoder()
        head = PreviewHead(2, observed(linear_decoder(), *range(4)))
        latents = torch.randn(1, 4, 16, 16, generator=seeded(5))
        updated = head.updated(PreviewHead.observe(2, latents, decode(latents)))
        before, after = ((each.decode(latents, 32, 32) - decode(latents)).square().mean() for each in (head, updated))
        assert after < 0.5 * before

    def test_similar_images_are_decoded_better(self):
        """Learning lowers the error on other images, and more images lower it further."""
        decode = self.other_decoder()
        head = PreviewHead(2, observed(linear_decoder(), *range(4)))
        errors = [error(head, decode)]
        for seed in range(10, 26):
            head = head.updated(observed(decode, seed))
            errors.append(error(head, decode))
        assert errors[0] > errors[4] > errors[16]
        assert errors[16] < 0.05 * errors[0]

    def test_updating_does_not_change_the_old_head(self):
        """Updating returns a new head, because the preview thread uses the old one."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        before = head.decode(latents, 16, 16)
        head.updated(observed(self.other_decoder(), 2))
        assert torch.equal(head.decode(latents, 16, 16), before)
        assert head.learned is None

    def test_old_images_lose_weight(self):
        """After any number of images, their total weight is at most that of about 128."""
        decode, image_statistics = linear_decoder(), observed(linear_decoder(), 3)
        head = PreviewHead(2, observed(decode, 0, 1))
        counts = []
        for _ in range(600):
            head = head.updated(image_statistics)
            counts.append(head.learned.count / image_statistics.count)
        assert counts == sorted(counts)
        assert counts[-1] == pytest.approx(3.0 * 128, rel=0.02)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_an_image_with_invalid_numbers_changes_nothing(self, poison):
        """After an image with NaN the head decodes as before."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        updated = head.updated(PreviewHead.observe(2, latents, torch.full((1, 3, 16, 16), poison)))
        assert torch.equal(updated.decode(latents, 16, 16), head.decode(latents, 16, 16))

    def test_a_large_image_is_sampled(self):
        """The number of cells of one image in the statistics is bounded, so that learning stays fast."""
        latents = torch.randn(1, 4, 100, 100, generator=seeded())
        assert 500 < PreviewHead.observe(1, latents, torch.rand(1, 3, 100, 100, generator=seeded())).count <= 1024
