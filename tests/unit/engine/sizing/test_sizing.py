"""Estimates of the memory that a model needs, from its files."""

import json
import re
import struct

import huggingface_hub
import pytest
import torch

from calotype_server.cli.doctor_memory import memory_findings
from calotype_server.engine import memory, memory_need, sizing
from calotype_server.engine.capabilities import Defaults, describe
from calotype_server.engine.loading import LoadOptions, load_pipeline
from calotype_server.engine.sizing.activations import decoding_bytes, denoising_bytes, native_edge
from calotype_server.engine.sizing.headers import read_header
from calotype_server.settings import Settings
from support.engine import tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def stored(module):
    """Returns a module's configuration as in its file, with the class."""
    return {**module.config, "_class_name": type(module).__name__}


def loaded_bytes(module):
    """Returns the bytes of all weights of a module; of the parts, if they are quantized."""
    total = 0
    for weight in module.parameters():
        names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else None
        parts = [weight] if names is None else [getattr(weight, name) for name in names]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


class TestWeights:
    """Bytes of weights."""

    @pytest.mark.parametrize("quantize", ["", "int8", "fp8"])
    def test_weights_are_those_that_load(self, flux_folder, sd15_folder, quantize):
        """Every component has the estimated number of bytes when it is loaded, plain or quantized."""
        for folder in (flux_folder, sd15_folder):
            pipeline = load_pipeline(LoadOptions(model=str(folder), quantize=quantize))
            components = sizing.find_components(folder)
            assert {each.name for each in components} == {
                name for name, each in pipeline.components.items() if isinstance(each, torch.nn.Module)
            }
            for component in components:
                expected = loaded_bytes(getattr(pipeline, component.name))
                # torchao keeps scales in float32, and transformers keeps T5's "wo" as it is.
                assert component.bytes(4, quantize) == pytest.approx(expected, rel=0.0 if not quantize else 0.1)

    def test_the_format_counts_not_that_of_the_file(self, sd15_folder):
        """Files in float32 that load as bfloat16 need half of their size."""
        for component in sizing.find_components(sd15_folder):
            stored = sum(each.stored_bytes for each in component.tensors)
            assert component.bytes(2) == pytest.approx(stored / 2, rel=0.01)

    def test_variants(self, folder):
        """Files of another variant do not count; without the chosen variant, the plain files do."""
        plain = sizing.find_components(folder)
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        for name in ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.non_ema.safetensors"):
            (file.parent / name).write_bytes(file.read_bytes())
        assert sizing.find_components(folder) == plain
        assert sizing.find_components(folder, "fp16") == plain
        assert sizing.find_components(folder, "none-such") == plain

    def test_several_files(self, tmp_path):
        """The parts of a component that is stored in several files are added up."""
        tiny.build("sd15").save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
        (unet,) = [each for each in sizing.find_components(tmp_path) if each.name == "unet"]
        assert unet.bytes(4) == loaded_bytes(tiny.shared("sd15").unet)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"abc",
            struct.pack("<Q", 2**40),
            struct.pack("<Q", 10) + b"not json!!",
            struct.pack("<Q", 8) + b'{"a": 1}',
            struct.pack("<Q", 2) + b"[]",
        ],
    )
    def test_damaged_files(self, tmp_path, content):
        """A file that is cut or something else raises an error that names it."""
        file = tmp_path / "x.safetensors"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors|JSON|Expecting"):
            read_header(file)

    def test_a_cached_hub_id(self, sd15_folder, monkeypatch):
        """A hub id is found in the local cache; without it there is no estimate, and nothing is downloaded."""
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda _, **__: str(sd15_folder))
        assert sizing.find_source("org/name") == sd15_folder
        monkeypatch.undo()
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(sd15_folder / "nothing"))
        assert sizing.find_source("org/name") is None

    def test_a_single_file(self, tmp_path):
        """The weights of a single file are divided by their names."""
        from safetensors.torch import save_file

        file = tmp_path / "model.safetensors"
        save_file(
            {
                "model.diffusion_model.a.weight": torch.zeros(8, 8),
                "first_stage_model.b": torch.zeros(4),
                "conditioner.c": torch.zeros(2),
            },
            file,
        )
        assert sizing.find_source(str(file)) == file
        found = {each.name: each.bytes(2) for each in sizing.find_components(file)}
        # Loading refuses `--quantize` with a single file.
        assert not any(each.quantizable for each in sizing.find_components(file))
        assert found == {"transformer": 128, "vae": 8, "text_encoder": 4}


class TestActivations:
    """Bytes of denoising and decoding, compared with those that `memory_need` measures on a CPU."""

    @pytest.mark.parametrize("family", ["sd15", "sdxl", "flux", "sana", "qwen_image", "z_image"])
    def test_decoding_is_close_to_the_measurement(self, family):
        """The estimate of the VAE is that of a real call, up to the post-processing of the image."""
        pipeline = tiny.shared(family)
        channels = pipeline.vae.config.get("latent_channels") or pipeline.vae.config.z_dim
        frames = (1,) if family == "qwen_image" else ()
        ratio = native_edge({"sample_size": 1}, pipeline.vae.config)
        sample = torch.zeros(1, channels, *frames, 128 // ratio, 128 // ratio)
        with torch.no_grad():
            measured = memory.peak_memory(lambda: pipeline.vae.decode(sample, return_dict=False), CPU)
        estimated = decoding_bytes(stored(pipeline.vae), 128, torch.float32)
        assert estimated == pytest.approx(measured, rel=0.1)

    @pytest.mark.parametrize("family", ["sd15", "sdxl", "lcm"])
    def test_a_unet_is_close_to_the_measurement(self, family):
        """The estimate of a UNet is that of a real call with guidance."""
        pipeline = tiny.shared(family)
        model = describe("tiny", pipeline, Defaults())
        (points,) = [each for each in memory_need._measure(pipeline, model, CPU) if each[0] == model.width**2]
        estimated = denoising_bytes(stored(pipeline.unet), pipeline.vae.config, model.width, torch.float32)
        assert estimated == pytest.approx(points[1], rel=0.1)

    def test_what_is_unknown(self):
        """A configuration of an unknown class gives no estimate."""
        assert decoding_bytes({"_class_name": "NoSuchVae"}, 64, torch.float32) is None
        assert denoising_bytes({"_class_name": "NoSuchModel"}, {}, 64, torch.float32) is None


class TestChoices:
    """Estimates for settings."""

    def test_a_cpu_has_no_offload(self, sd15_folder):
        """On a CPU there are formats only, the plain one first; int8 needs less."""
        plain, int8, fp8 = sizing.estimates(sizing.find_components(sd15_folder), CPU, torch.float32)
        assert [each.quantize for each in (plain, int8, fp8)] == ["", "int8", "fp8"]
        assert {each.offload for each in (plain, int8, fp8)} == {""}
        assert plain.total > int8.total == fp8.total

    def test_offload_needs_less_of_the_device(self, flux_folder):
        """On a GPU, each kind of offloading needs less of the device than the one before, but ordinary memory."""
        found = list(sizing.estimates(sizing.find_components(flux_folder), CUDA, torch.bfloat16, 64))
        by_choice = {(each.quantize, each.offload): each for each in found}
        assert len(by_choice) == len(found) == 11
        whole, model, group = (by_choice["", offload] for offload in ("", "model", "group"))
        assert whole.weights > model.weights >= group.weights
        assert (whole.host, model.host) == (0, group.host)
        assert model.host == whole.weights

    def test_the_whole_need_is_close_to_the_measurement(self, sd15_folder):
        """Weights, denoising and decoding of a UNet together are those of a loaded model and a measured generation."""
        pipeline = load_pipeline(LoadOptions(model=str(sd15_folder)))
        model = describe("tiny", pipeline, Defaults())
        weights = sum(loaded_bytes(each) for each in pipeline.components.values() if isinstance(each, torch.nn.Module))
        (points,) = [each for each in memory_need._measure(pipeline, model, CPU) if each[0] == model.width**2]
        (first, *_) = sizing.estimates(sizing.find_components(sd15_folder), CPU, torch.float32)
        assert first.edge == model.width
        assert first.total == pytest.approx(weights + max(points[1:]), rel=0.15)


class TestDoctor:
    """The lines that `calotype doctor` prints."""

    def lines(self, folder, monkeypatch, free, **options):
        monkeypatch.setattr(memory, "free_memory", lambda _: free)
        found = list(memory_findings(Settings(model=str(folder), **options), CUDA, torch.bfloat16))
        assert all(each.ok and each.subject == "memory" for each in found)
        return [each.result for each in found]

    def test_it_says_what_fits(self, sd15_folder, monkeypatch):
        """Each choice has a line with its need and whether it fits; the chosen one has a star."""
        title, *rows, sources = self.lines(sd15_folder, monkeypatch, 10**12, quantize="int8", offload="model")
        assert re.search(r"64x64, 1000.0 GB free on cuda:0", title)
        assert "headers" in sources
        assert len(rows) == 11
        assert [row for row in rows if row.startswith("*")] == [row for row in rows if "int8 --offload model" in row]
        assert all(" fits " in row for row in rows)
        _, *rows, _ = self.lines(sd15_folder, monkeypatch, 1)
        assert all("does not fit" in row for row in rows)

    def test_unknown_memory(self, sd15_folder, monkeypatch):
        """A device that does not report its free memory has needs only."""
        title, *rows, _ = self.lines(sd15_folder, monkeypatch, None)
        assert "unknown free" in title
        assert not any("fit" in row for row in rows)

    def test_files_that_cannot_be_read(self, folder, monkeypatch):
        """Damaged and missing files are no failure of the estimate: loading reports them."""
        (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
        assert "cannot be estimated" in self.lines(folder, monkeypatch, 1)[0]
        for file in folder.glob("*/*.safetensors"):
            file.unlink()
        assert "no safetensors files" in self.lines(folder, monkeypatch, 1)[0]

    def test_a_model_without_known_classes(self, folder, monkeypatch):
        """Weights are estimated also if the configurations are unknown."""
        config = json.loads((folder / "unet" / "config.json").read_text())
        config["_class_name"] = "NoSuchModel"
        (folder / "unet" / "config.json").write_text(json.dumps(config))
        assert "working ?" in self.lines(folder, monkeypatch, 1)[1]
