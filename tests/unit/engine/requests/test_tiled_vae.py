"""If memory runs out while an image is decoded, it is decoded in tiles."""

import functools

import pytest
import torch

from calotype_server import errors
from calotype_server.engine.assembly import build_engine
from calotype_server.engine.capabilities import Defaults
from calotype_server.engine.memory import is_out_of_memory
from calotype_server.engine.requests import tiled_vae
from calotype_server.engine.requests.tiled_vae import TilingVae, when_tiled
from calotype_server.types import Noticed
from support.engine import tiny
from support.engine.device_errors import EXHAUSTED, FAILED, OTHER
from support.runs import JOB, Run


def settings(vae):
    """Returns the settings for tiles."""
    return {name: getattr(vae, name) for name in tiled_vae._TILE_SETTINGS if hasattr(vae, name)}


def exhaust(monkeypatch, vae, most, error=EXHAUSTED[0]):
    """Lets memory suffice for `most` latents along an edge; returns the edges that were tried."""
    decode, tried = vae.decoder.forward, []

    @functools.wraps(decode)
    def limited(sample, *args, **kwargs):
        tried.append(max(sample.shape[-2:]))
        if tried[-1] > most:
            raise error
        return decode(sample, *args, **kwargs)

    monkeypatch.setattr(vae.decoder, "forward", limited)
    return tried


def latents(family, vae):
    """Returns the latents of an image of 16 x 12 latents."""
    channels = vae.config.get("latent_channels") or vae.config.z_dim
    shape = (1, channels, 1, 16, 12) if family == "qwen_image" else (1, channels, 16, 12)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["sd15", "flux2_klein", "qwen_image", "sana"])
@torch.no_grad()
def test_a_failed_decode_is_repeated_in_tiles(monkeypatch, family):
    """Tiles of half an edge give an image of the same size; afterwards the VAE is as before."""
    vae = tiny.build(family).vae
    if hasattr(vae, "tile_latent_min_size"):
        # As in real models: a tile is as large as an image of the default size.
        vae.tile_latent_min_size, vae.tile_sample_min_size = 16, 128
    before, sample = settings(vae), latents(family, vae)
    expected = vae.decode(sample, return_dict=False)[0]
    tried, released, tiled = exhaust(monkeypatch, vae, 8), [], []
    monkeypatch.setattr(tiled_vae, "release_cached_memory", released.append)
    with when_tiled(lambda: tiled.append(len(tried))):
        decoded = TilingVae(vae).decode(sample, return_dict=False)[0]
    # The values of random weights differ: their normalization of a whole image is not that of a tile.
    assert decoded.shape == expected.shape
    assert torch.isfinite(decoded).all()
    assert tried[0] == 16
    assert max(tried[1:]) <= 8
    assert (released, len(tiled)) == ([sample.device], 1)
    assert settings(vae) == before


@torch.no_grad()
def test_enough_memory_changes_nothing(monkeypatch):
    """The image is bit for bit that of the VAE, and no listener is called."""
    vae = tiny.build("sd15").vae
    sample = latents("sd15", vae)
    with when_tiled(lambda: pytest.fail("tiled")):
        assert torch.equal(TilingVae(vae).decode(sample).sample, vae.decode(sample).sample)


@pytest.mark.parametrize("error", [FAILED[0], OTHER[0]])
@torch.no_grad()
def test_other_errors_are_not_retried(monkeypatch, error):
    """A failed device or a fault of the model is raised at once."""
    vae = tiny.build("sd15").vae
    tried = exhaust(monkeypatch, vae, 4, error)
    with pytest.raises(type(error)):
        TilingVae(vae).decode(latents("sd15", vae))
    assert len(tried) == 1


@torch.no_grad()
def test_memory_that_runs_out_again_is_an_error(monkeypatch):
    """The second failure is raised, and the VAE is as before."""
    vae = tiny.build("sd15").vae
    before, tried = settings(vae), exhaust(monkeypatch, vae, 2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        TilingVae(vae).decode(latents("sd15", vae))
    assert is_out_of_memory(caught.value)
    assert len(tried) == 2
    assert settings(vae) == before


class TestEngine:
    """Generations on an engine whose VAE runs out of memory."""

    @pytest.fixture
    def pipeline(self):
        return tiny.build("sd15")

    @pytest.fixture
    def engine(self, pipeline, tmp_path):
        engine = build_engine("tiny", pipeline, defaults=Defaults(), cache_dir=tmp_path, threads=1)
        yield engine
        engine.close()

    @pytest.mark.parametrize("early", [False, True])
    def test_the_caller_is_warned(self, engine, pipeline, monkeypatch, early, logs):
        """A generation gets its image with one warning, also if it ends early; the log has one line."""
        exhaust(monkeypatch, pipeline.vae, 4)
        run = Run(engine)
        if early:
            run.stop.finish()
        image = run(JOB)
        assert (image.width, image.height) == (JOB.width, JOB.height)
        (noticed,) = [event for event in run.events if isinstance(event, Noticed)]
        assert [notice.reason for notice in noticed.notices] == ["DECODED_IN_TILES"]
        assert len([line for line in logs if "tiles" in line["event"]]) == 1

    def test_memory_that_runs_out_again_is_reported(self, engine, pipeline, monkeypatch):
        """If tiles do not help, the generation ends with OUT_OF_MEMORY, and the next one works."""
        with monkeypatch.context() as patch:
            exhaust(patch, pipeline.vae, 2)
            with pytest.raises(errors.OutOfMemory):
                Run(engine)(JOB)
        assert Noticed not in Run(engine).kinds
        assert Run(engine)(JOB).width == JOB.width
