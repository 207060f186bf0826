"""Heads on disk: written whole or not at all, found again by what they were fitted to."""

import copy
import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from calotype_server.engine import disk_cache
from calotype_server.engine.preview import head_cache
from calotype_server.engine.preview.head import PreviewHead
from calotype_server.engine.preview.head_cache import head_path, load_head, save_head
from support.engine import tiny
from support.engine.heads import linear_decoder, observed, seeded


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
        assert torch.equal(loaded.decode(latents, 16, 16), head.decode(latents, 16, 16))
        assert loaded.learned is None
        assert [file.name for file in path.parent.iterdir()] == ["head.safetensors"]

    def test_lessons_survive(self, tmp_path, head):
        """A taught head is the same head after it is loaded, and the next lesson changes both alike."""
        path = tmp_path / "head.safetensors"
        taught = head.updated(observed(linear_decoder(), 2)).updated(observed(linear_decoder(), 3))
        save_head(path, taught)
        loaded = load_head(path)
        for mine, its in ((taught.calibration, loaded.calibration), (taught.learned, loaded.learned)):
            assert mine.count == its.count
            assert torch.equal(mine.inputs, its.inputs)
            assert torch.equal(mine.products, its.products)
        latents = torch.randn(1, 4, 8, 8, generator=seeded())
        lesson = observed(linear_decoder(), 4)
        again, anew = (each.updated(lesson).decode(latents, 16, 16) for each in (taught, loaded))
        assert torch.equal(again, anew)

    def test_absent_file_is_no_head(self, tmp_path, logs):
        """Nothing in the cache gives None, and that is nothing to warn about."""
        assert load_head(tmp_path / "head.safetensors") is None
        assert logs == []

    @pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "other", "old", "nan", "flipped"])
    def test_damaged_file_is_no_head(self, tmp_path, head, logs, damage):
        """Whatever is wrong with the file, loading gives None and a warning that names it; saving heals it."""
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
                "other": head_cache.save({"weights": torch.zeros(3)}),
                "old": head_cache.save(old, metadata={"checksum": head_cache._checksum(old)}),
                "nan": head_cache.save(nan, metadata={"checksum": head_cache._checksum(nan)}),
                "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
            }[damage]
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

        monkeypatch.setattr(disk_cache.os, "replace", full)
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

        monkeypatch.setattr(disk_cache.os, "replace", full)
        save_head(path, PreviewHead(1, head.calibration))
        assert path.read_bytes() == before

    def test_same_decoder_has_the_same_key(self, tmp_path):
        """Two loads of the same weights share a head."""
        assert head_path(tmp_path, tiny.build("sd15")) == head_path(tmp_path, tiny.build("sd15"))

    @pytest.mark.parametrize("place", [0, -1])
    def test_key_follows_the_weights(self, tmp_path, place):
        """A fine-tuned decoder has a head of its own, whichever end of its weights has changed."""
        pipeline = tiny.build("sd15")
        before = head_path(tmp_path, pipeline)
        with torch.no_grad():
            pipeline.vae.decoder.conv_out.weight.view(-1)[place] += 1e-3
        assert head_path(tmp_path, pipeline) != before

    def test_key_follows_the_config(self, tmp_path):
        """The same weights with another scale of the latents have a head of their own."""
        pipeline = tiny.build("sd15")
        before = head_path(tmp_path, pipeline)
        pipeline.vae.register_to_config(scaling_factor=0.5)
        assert head_path(tmp_path, pipeline) != before

    def test_key_follows_the_pipeline(self, tmp_path):
        """The same decoder behind another pipeline, which may pack latents, has a head of its own."""
        flux, chroma = copy.copy(tiny.shared("flux")), copy.copy(tiny.shared("chroma"))
        chroma.__dict__["vae"] = flux.vae
        assert head_path(tmp_path, chroma) != head_path(tmp_path, flux)

    def test_home_is_expanded(self, tmp_path, monkeypatch, sd15):
        """`~` in the folder is the user's home."""
        monkeypatch.setenv("HOME", str(tmp_path))
        path = head_path(Path("~/cache"), sd15)
        assert path.is_relative_to(tmp_path / "cache")
