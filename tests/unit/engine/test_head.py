"""The preview head, its calibration against the pipeline's own decoder, and its place on disk."""

import pytest
import torch

from calotype_server.engine.preview.head import PreviewHead, to_grid
from support.heads import error, linear_decoder, observed, seeded


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
