"""Repeated decoding skips the pipeline's Python code and gives the same images."""

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from calotype_server.engine.preview.pipeline_tail import PipelineTail
from support.engine import tiny
from support.engine.heads import seeded

WIDTH, HEIGHT = 64, 32
SIZES = {"sana": (128, 64), "sana_sprint": (128, 64)}
REPEATED = [each for each in tiny.FAMILIES if each != "flux2_klein"]
"""FLUX.2 reads the positions of its tokens in Python."""


class Counted:
    """A tail that counts the calls of the pipeline."""

    def __init__(self, pipeline, size=(WIDTH, HEIGHT)):
        self.size = size
        self.calls = 0
        self._tail = PipelineTail(pipeline)
        self.shape = self._tail.shape(*size)
        call = self._tail._call

        def counting(*args, **kwargs):
            self.calls += 1
            return call(*args, **kwargs)

        self._tail._call = counting

    def latents(self, seed, batch=1):
        """Returns latents for images of the size."""
        return torch.randn(batch, *self.shape[1:], generator=seeded(seed))

    def decode(self, latents):
        """Decodes, as the preview thread does."""
        with torch.no_grad():
            return self._tail.decode(latents, *self.size)


@pytest.mark.parametrize(
    "family", [each if each in tiny.REPRESENTATIVE else pytest.param(each, marks=pytest.mark.slow) for each in REPEATED]
)
def test_the_third_image_needs_no_pipeline(family):
    """The pipeline draws two images of a size; those that follow are the same bit for bit without calling it."""
    pipeline = tiny.prompted(family)
    tail = Counted(pipeline, SIZES.get(family, (WIDTH, HEIGHT)))
    images = [tail.decode(tail.latents(seed)) for seed in range(4)]
    assert tail.calls == 2
    fresh = Counted(pipeline, tail.size)
    assert torch.equal(images[3], fresh.decode(tail.latents(3)))
    assert not torch.equal(images[3], images[2])
    both = tail.latents(4, batch=2)
    assert torch.equal(tail.decode(both), torch.cat([fresh.decode(one) for one in both.split(1)]))
    assert tail.calls == 2


def test_the_denoiser_is_not_recorded():
    """No dispatch mode is active while the denoiser runs: a compiled one could not run then."""
    modes = []
    pipeline = tiny.build("sd15")
    pipeline.unet.register_forward_hook(lambda *_: modes.append(_get_current_dispatch_mode()))
    tail = PipelineTail(pipeline)
    tail.decode(torch.randn(1, 4, 4, 8, generator=seeded(0)), WIDTH, HEIGHT)
    assert modes == [None]


def test_the_same_latents_prove_nothing(sd15):
    """Until other latents were decoded twice, the pipeline draws each image."""
    tail = Counted(sd15)
    for _ in range(3):
        tail.decode(tail.latents(0))
    assert tail.calls == 3


@pytest.mark.parametrize("kind", ["reads", "random", "constant"])
def test_a_pipeline_that_cannot_be_repeated_is_called_each_time(kind):
    """A pipeline that reads numbers in Python, draws random numbers or writes into a kept tensor is always called."""
    pipeline = tiny.build("sd15")
    kept = torch.zeros(1, 3, HEIGHT, WIDTH)
    postprocess = pipeline.image_processor.postprocess

    def unusual(image, **kwargs):
        if kind == "reads":
            image = image * 0.5 if float(image.mean()) > 1e9 else image
        elif kind == "random":
            image = image + torch.randn(image.shape)
        else:
            image = kept.copy_(image)
        return postprocess(image, **kwargs)

    pipeline.image_processor.postprocess = unusual
    tail = Counted(pipeline)
    for seed in range(4):
        tail.decode(tail.latents(seed))
    assert tail.calls == 4
