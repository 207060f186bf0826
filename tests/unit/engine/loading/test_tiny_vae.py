"""Loading and choosing the small VAE that decodes previews."""

import copy
import json
import pickle

import diffusers
import pytest
import torch

from calotype_server.engine.factory import load_engine
from calotype_server.engine.loading import load_tiny_vae
from calotype_server.errors import ModelUnavailable
from calotype_server.observability.events import ignore
from calotype_server.settings import Settings
from calotype_server.types import PreviewMethod
from support.engine import tiny
from support.engine.tiny_unets import tiny_vae


class TestTinyVae:
    """The small decoder for previews."""

    @pytest.fixture
    def tiny_folder(self, tmp_path):
        """A folder with an `AutoencoderTiny` of four latent channels."""
        tiny_vae().save_pretrained(tmp_path / "tiny-vae")
        return tmp_path / "tiny-vae"

    @staticmethod
    def rejected(name, like):
        with pytest.raises(ModelUnavailable) as caught:
            load_tiny_vae(str(name), like)
        text = str(caught.value)
        assert "\n" not in text
        assert str(name) in text
        return text

    def test_folder_loads(self, tiny_folder, sd15):
        """It has the device and the number format of the VAE that it replaces, and is in evaluation mode."""
        vae = load_tiny_vae(str(tiny_folder), sd15.vae)
        assert type(vae) is diffusers.AutoencoderTiny
        assert not vae.training
        half = copy.deepcopy(sd15.vae).to(torch.bfloat16)
        assert load_tiny_vae(str(tiny_folder), half).dtype is torch.bfloat16

    def test_relative_path(self, tiny_folder, sd15, monkeypatch):
        """Relative paths are accepted."""
        monkeypatch.chdir(tiny_folder.parent)
        assert load_tiny_vae(f"./{tiny_folder.name}", sd15.vae)
        assert load_tiny_vae(tiny_folder.name, sd15.vae)

    @pytest.mark.parametrize("family", ["z_image", "qwen_image"])
    def test_wrong_number_of_channels(self, tmp_path, family):
        """A decoder for other latents is rejected; the message has both numbers of channels."""
        tiny_vae(channels=3).save_pretrained(tmp_path)
        text = self.rejected(tmp_path, tiny.shared(family).vae)
        assert "has 3 latent channels" in text
        assert f"the model has {16 if family == 'z_image' else 4}." in text

    def test_missing_folder(self, tmp_path, sd15):
        """The message for a missing folder names it."""
        assert "AutoencoderTiny" in self.rejected(tmp_path / "nothing", sd15.vae)

    def test_something_else(self, sd15_folder, sd15):
        """A folder of another class is rejected."""
        assert "AutoencoderTiny" in self.rejected(sd15_folder, sd15.vae)

    def test_hub_without_network(self, offline, sd15):
        """The message for an unreachable hub id names it."""
        assert "org/no-such-vae" in self.rejected("org/no-such-vae", sd15.vae)

    def test_pickled_weights_are_rejected(self, tiny_folder, tmp_path, sd15):
        """Weights that exist only as a pickle are rejected."""
        (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": 0}))
        self.rejected(tmp_path, sd15.vae)


class TestServing:
    """`load_engine` applies the settings."""

    @staticmethod
    def engine(folder, tmp_path, **settings):
        """Returns the preview methods of the engine that `calotype serve` would run."""
        chosen = Settings(model=str(folder), device="cpu", threads=1, cache_dir=tmp_path, **settings)
        engine = load_engine(chosen, ignore)
        engine.close()
        return engine.model.preview_methods

    def test_tiny_vae_by_flag_and_by_file(self, folder, tmp_path):
        """The tiny VAE comes from the flag, or from the model's `calotype.json`; without either there is none."""
        tiny_vae().save_pretrained(folder / "previews")
        assert PreviewMethod.TINY_VAE not in self.engine(folder, tmp_path)
        assert PreviewMethod.TINY_VAE in self.engine(folder, tmp_path, tiny_vae=str(folder / "previews"))
        (folder / "calotype.json").write_text(json.dumps({"tiny_vae": "previews"}))
        assert PreviewMethod.TINY_VAE in self.engine(folder, tmp_path, preview_method="tiny_vae")
        assert self.engine(folder, tmp_path, preview_methods="head") == (PreviewMethod.HEAD,)

    def test_an_unavailable_default_method_is_rejected(self, sd15_folder, tmp_path):
        """A default method that the model lacks is rejected at start, with the flag and the available methods."""
        with pytest.raises(ModelUnavailable, match=r"--preview-method is tiny_vae.*--tiny-vae.*auto, head, full_vae"):
            self.engine(sd15_folder, tmp_path, preview_method="tiny_vae")
