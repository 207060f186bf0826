"""Preview heads on disk: written atomically, and found by the decoder that they were fitted to."""

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from calotype_server.engine.preview import head_cache
from calotype_server.engine.preview.head import PreviewHead
from calotype_server.engine.preview.head_cache import head_path, load_head, save_head
from support.engine import tiny
from support.engine.heads import linear_decoder, observed, seeded


class TestCache:
    """A head is calibrated once for each decoder, and a damaged file is only calibrated again."""

    @pytest.fixture
    def head(self):
        return PreviewHead(2, observed(linear_decoder(), 0, 1))

    def test_round_trip(self, tmp_path, head):
        """A saved head decodes to the same image after loading."""
        path = tmp_path / "new" / "folder" / "head.safetensors"
        save_head(path, head)
        loaded = load_head(path)
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        assert loaded.scale == head.scale
        assert torch.equal(loaded.decode(latents, 16, 16), head.decode(latents, 16, 16))
        assert loaded.learned is None
        assert [file.name for file in path.parent.iterdir()] == ["head.safetensors"]

    def test_learned_statistics_are_saved(self, tmp_path, head):
        """A head that has learned is the same after loading, and learns further in the same way."""
        path = tmp_path / "head.safetensors"
        updated = head.updated(observed(linear_decoder(), 2)).updated(observed(linear_decoder(), 3))
        save_head(path, updated)
        loaded = load_head(path)
        for saved, read in ((updated.calibration, loaded.calibration), (updated.learned, loaded.learned)):
            assert saved.count == read.count
            assert torch.equal(saved.inputs, read.inputs)
            assert torch.equal(saved.products, read.products)
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        statistics = observed(linear_decoder(), 4)
        original, reloaded = (each.updated(statistics).decode(latents, 16, 16) for each in (updated, loaded))
        assert torch.equal(original, reloaded)

    def test_a_missing_file_is_not_logged(self, tmp_path, logs):
        """Without a file there is no head, and nothing to warn about."""
        assert load_head(tmp_path / "head.safetensors") is None
        assert logs == []

    @pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other", "old", "nan", "flipped"])
    def test_a_damaged_file_is_ignored_with_one_warning(self, tmp_path, head, logs, damage):
        """Any damage gives no head and one warning with the path; saving repairs the file."""
        path = tmp_path / "head.safetensors"
        save_head(path, head)
        whole = path.read_bytes()
        tensors = load_file(path)
        old = {name.removeprefix("calibration."): value for name, value in tensors.items()}
        nan = {**tensors, "calibration.products": torch.full_like(tensors["calibration.products"], float("nan"))}
        path.write_bytes(
            {
                "empty": b"",
                "cut": whole[:-100],
                "garbage": b"\xff" * 500,
                "other": save({"weights": torch.zeros(3)}),
                "old": save(old, metadata={"checksum": head_cache._checksum(old)}),
                "nan": save(nan, metadata={"checksum": head_cache._checksum(nan)}),
                "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
            }[damage]
        )
        assert load_head(path) is None
        assert [(entry["log_level"], entry["path"]) for entry in logs] == [("warning", str(path))]
        save_head(path, head)
        assert load_head(path) is not None

    def test_an_unwritable_folder_is_no_error(self, tmp_path, head, logs):
        """If the folder cannot be created, saving logs a warning."""
        obstacle = tmp_path / "file"
        obstacle.write_text("not a folder")
        path = obstacle / "heads" / "head.safetensors"
        save_head(path, head)
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert load_head(path) is None

    def test_interrupted_write_leaves_nothing(self, tmp_path, head, logs, monkeypatch):
        """If the disk is full at the last moment, no file remains."""

        def full(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        save_head(tmp_path / "head.safetensors", head)
        assert [entry["log_level"] for entry in logs] == ["warning"]
        assert list(tmp_path.iterdir()) == []

    def test_interrupted_write_keeps_the_old_file(self, tmp_path, head, logs, monkeypatch):
        """If the new head cannot be written, the old file stays."""
        path = tmp_path / "head.safetensors"
        save_head(path, head)
        before = path.read_bytes()

        def full(source, target):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        save_head(path, PreviewHead(1, head.calibration))
        assert path.read_bytes() == before

    def test_same_decoder_has_the_same_key(self, tmp_path):
        """Two pipelines with the same weights share a head."""
        assert head_path(tmp_path, tiny.build("sd15")) == head_path(tmp_path, tiny.build("sd15"))

    @pytest.mark.parametrize("place", [0, -1])
    def test_key_follows_the_weights(self, tmp_path, place):
        """A change at either end of a weight tensor changes the key."""
        pipeline = tiny.build("sd15")
        before = head_path(tmp_path, pipeline)
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.weight.view(-1)[place] += 1e-3
        assert head_path(tmp_path, pipeline) != before

    def test_key_follows_the_config(self, tmp_path):
        """A change of the decoder's config changes the key."""
        pipeline = tiny.build("sd15")
        before = head_path(tmp_path, pipeline)
        pipeline.vae.register_to_config(scaling_factor=0.5)
        assert head_path(tmp_path, pipeline) != before

    def test_key_follows_the_pipeline(self, tmp_path):
        """The same decoder in another kind of pipeline, which may pack latents, has another key."""
        flux, chroma = copy.copy(tiny.shared("flux")), copy.copy(tiny.shared("chroma"))
        chroma.__dict__["vae"] = flux.vae
        assert head_path(tmp_path, chroma) != head_path(tmp_path, flux)

    def test_home_is_expanded(self, tmp_path, monkeypatch, sd15):
        """`~` in the folder means the user's home."""
        monkeypatch.setenv("HOME", str(tmp_path))
        path = head_path(Path("~/cache"), sd15)
        assert path.is_relative_to(tmp_path / "cache")
