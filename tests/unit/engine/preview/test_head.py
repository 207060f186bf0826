"""The preview head: what it is fitted to, what it draws, and what it learns from finished images."""

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
        difference = head.decode(latents, 32, 32) - decode(latents).clamp(0, 1)
        assert difference.abs().max() < 0.008

    def test_more_observations_lower_the_error(self):
        """With a noisy decoder, sixteen pictures teach more than four, and four more than one."""
        decode = linear_decoder()
        errors = [error(PreviewHead(2, observed(decode, *range(n), noise=0.1)), decode) for n in (1, 4, 16)]
        assert errors[0] > errors[1] > errors[2]

    def test_same_statistics_give_the_same_picture(self):
        """Two heads of equal statistics draw equal pictures."""
        statistics = observed(linear_decoder(), 0, 1)
        latents = torch.randn(1, 4, 16, 16, generator=seeded(7))
        first, second = (PreviewHead(2, statistics).decode(latents, 32, 32) for _ in range(2))
        assert torch.equal(first, second)

    @pytest.mark.parametrize(
        ("shape", "width", "height"),
        [((1, 4, 6, 9), 72, 48), ((2, 4, 6, 9), 72, 48), ((1, 4, 1, 6, 9), 72, 48), ((1, 54, 4), 72, 48)],
    )
    def test_picture_has_pixels_of_every_cell(self, shape, width, height):
        """Every layout gives one picture for each of the batch, with `scale` pixels for each cell."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        pictures = head.decode(torch.randn(shape, generator=seeded()), width, height)
        assert pictures.shape == (shape[0], 3, 12, 18)
        assert (pictures.min() >= 0, pictures.max() <= 1) == (True, True)

    def test_out_of_range_is_clipped(self):
        """Latents far from any that were seen give black and white."""
        random = seeded()
        latents = torch.randn(1, 1, 8, 8, generator=random)
        head = PreviewHead(1, PreviewHead.observe(1, latents, 0.5 + 0.1 * latents.expand(1, 3, 8, 8)))
        assert head.decode(torch.full((1, 1, 4, 4), 100.0), 4, 4).min() == 1
        assert head.decode(torch.full((1, 1, 4, 4), -100.0), 4, 4).max() == 0

    def test_decoding_leaves_the_latents_alone(self):
        """The denoiser goes on with the very latents that are drawn."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        before = latents.clone()
        head.decode(latents, 16, 16)
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


class TestLessons:
    """Finished images teach the head what planted latents could not."""

    @staticmethod
    def other_decoder():
        """A decoder that the head was not calibrated for: what a model's real latents are decoded to."""
        decode = linear_decoder()
        return lambda latents: 0.3 + 0.5 * decode(latents.flip(1))

    def test_what_was_seen_is_drawn_better(self):
        """A lesson lowers the error on the very image that it came from."""
        decode = self.other_decoder()
        head = PreviewHead(2, observed(linear_decoder(), *range(4)))
        latents = torch.randn(1, 4, 16, 16, generator=seeded(5))
        taught = head.updated(PreviewHead.observe(2, latents, decode(latents)))
        before, after = ((each.decode(latents, 32, 32) - decode(latents)).square().mean() for each in (head, taught))
        assert after < 0.5 * before

    def test_images_of_the_same_kind_are_drawn_better(self):
        """Lessons carry over to pictures that were not seen, the more of them the better."""
        decode = self.other_decoder()
        head = PreviewHead(2, observed(linear_decoder(), *range(4)))
        errors = [error(head, decode)]
        for seed in range(10, 26):
            head = head.updated(observed(decode, seed))
            errors.append(error(head, decode))
        assert errors[0] > errors[4] > errors[16]
        assert errors[16] < 0.05 * errors[0]

    def test_the_head_that_is_taught_stays_as_it_was(self):
        """A head in use by the preview thread is exchanged, never changed."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        before = head.decode(latents, 16, 16)
        head.updated(observed(self.other_decoder(), 2))
        assert torch.equal(head.decode(latents, 16, 16), before)
        assert head.learned is None

    def test_old_lessons_fade(self):
        """However many images there were, what has been seen weighs no more than the last few hundred of them."""
        decode, lesson = linear_decoder(), observed(linear_decoder(), 3)
        head = PreviewHead(2, observed(decode, 0, 1))
        counts = []
        for _ in range(600):
            head = head.updated(lesson)
            counts.append(head.learned.count / lesson.count)
        assert counts == sorted(counts)
        assert counts[-1] == pytest.approx(3.0 * 128, rel=0.02)

    @pytest.mark.parametrize("poison", [float("nan"), float("inf")])
    def test_an_image_of_invalid_numbers_teaches_nothing(self, poison):
        """A broken picture leaves a head that draws as before."""
        head = PreviewHead(2, observed(linear_decoder(), 0, 1))
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        taught = head.updated(PreviewHead.observe(2, latents, torch.full((1, 3, 16, 16), poison)))
        assert torch.equal(taught.decode(latents, 16, 16), head.decode(latents, 16, 16))

    def test_a_large_image_teaches_by_a_sample(self):
        """The cells of one picture that enter the statistics are bounded, so that a lesson stays quick."""
        latents = torch.randn(1, 4, 100, 100, generator=seeded())
        assert 500 < PreviewHead.observe(1, latents, torch.rand(1, 3, 100, 100, generator=seeded())).count <= 1024
