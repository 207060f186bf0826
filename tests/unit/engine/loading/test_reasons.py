"""Models that cannot be loaded: the message names the problem and the remedy."""

import json
import sys

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.utils import (
    dummy_torch_and_scipy_objects,
    dummy_torch_and_transformers_and_sentencepiece_objects,
)

from calotype_server.cli import doctor
from calotype_server.engine import factory
from calotype_server.engine.requests import trial
from calotype_server.errors import ModelUnavailable
from calotype_server.observability.events import ignore
from calotype_server.settings import Settings
from support.engine import tiny
from support.engine.device_errors import EXHAUSTED, FAILED
from support.engine.files.loading import checked, load, rejection
from support.engine.tiny_inputs import arguments


def edit(folder, **changes):
    """Changes the index of a folder."""
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def absent(monkeypatch):
    """Makes a package of diffusers' backends look as it does where it is not installed."""

    def remove(name):
        backends = diffusers.utils.import_utils.BACKENDS_MAPPING
        monkeypatch.setitem(backends, name, (lambda: False, backends[name][1]))
        monkeypatch.setitem(sys.modules, name, None)

    return remove


class TestFiles:
    """Folders that lack files."""

    def test_only_the_fp16_variant(self, tmp_path):
        """A folder with only float16 weights names the option that loads them, and loads with it."""
        tiny.build("sd15").save_pretrained(tmp_path, variant="fp16")
        text = rejection(tmp_path)
        assert "Only the fp16 variant" in text
        assert text.endswith("add --variant fp16.")
        assert load(tmp_path, variant="fp16").unet is not None

    def test_another_variant(self, tmp_path, sd15_folder):
        """A variant that does not exist is an error that lists the variants that do."""
        assert rejection(sd15_folder, variant="fp16").endswith("no weights of the variant fp16: leave --variant out.")
        tiny.build("sd15").save_pretrained(tmp_path, variant="fp16")
        assert rejection(tmp_path, variant="bf16").endswith("no weights of the variant bf16: it has fp16.")

    def test_only_the_fp16_variant_on_the_hub(self, monkeypatch, folder):
        """The files on the hub are examined like those of a folder."""
        tiny.build("sd15").save_pretrained(folder / "fp16", variant="fp16")
        files = [file.relative_to(folder / "fp16").as_posix() for file in (folder / "fp16").rglob("*.*")]

        def fail(*_, **__):
            raise OSError("no file named diffusion_pytorch_model.safetensors")

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "model_index.json"))
        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", fail)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: files)
        assert "--variant fp16" in rejection("some-org/some-model")

    def test_missing_part_of_sharded_weights(self, folder):
        """If one of several files of weights is missing, the message counts them."""
        unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
        for file in (folder / "unet").glob("*.safetensors"):
            file.unlink()
        unet.save_pretrained(folder / "unet", max_shard_size="200KB")
        shards = sorted((folder / "unet").glob("*-of-*.safetensors"))
        assert len(shards) > 1
        assert load(folder).unet is not None
        shards[-1].unlink()
        assert f"unet lacks 1 of its {len(shards):05} files of weights" in rejection(folder)

    def test_missing_safety_checker(self, folder):
        """A listed safety checker without files can be left out by the operator; the images stay the same."""
        edit(folder, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True)
        assert "start with --no-safety-checker; images are then not checked." in rejection(folder)
        pipeline = load(folder, safety_checker=False)
        assert pipeline.safety_checker is None
        assert torch.equal(pipeline(**arguments("sd15"))[0], tiny.shared("sd15")(**arguments("sd15"))[0])


class TestClasses:
    """Models with classes that are not available."""

    def test_unknown_pipeline(self, folder):
        """A pipeline class that this version of diffusers does not have is named, with both versions."""
        edit(folder, _class_name="StableDiffusion9Pipeline", _diffusers_version="9.1.0")
        text = rejection(folder)
        assert (
            f"StableDiffusion9Pipeline as its pipeline, which diffusers {diffusers.__version__} does not have" in text
        )
        assert "saved by diffusers 9.1.0" in text
        assert "pip install -U diffusers" in text

    def test_settings_of_the_pipeline_are_no_components(self, folder):
        """Lists of numbers in the index, and components that the pipeline does not take, are ignored."""
        edit(folder, sizes=[64, 64], watermark=["watermark_package", "Watermark"])
        assert load(folder).unet is not None

    def test_unknown_component(self, folder):
        """So is a component class of either library."""
        edit(folder, unet=["diffusers", "UNet9Model"])
        assert "names UNet9Model as its unet, which diffusers" in rejection(folder)
        edit(folder, unet=["diffusers", "UNet2DConditionModel"], text_encoder=["transformers", "Clip9Model"])
        assert "names Clip9Model as its text_encoder, which transformers" in rejection(folder)

    def test_pipeline_whose_package_is_missing(self, folder, monkeypatch, absent):
        """A pipeline that needs a package names it with the command that installs it."""
        absent("sentencepiece")
        placeholder = dummy_torch_and_transformers_and_sentencepiece_objects.KolorsPipeline
        monkeypatch.setattr(diffusers, "KolorsPipeline", placeholder)
        edit(folder, _class_name="KolorsPipeline")
        assert rejection(folder).endswith(
            "KolorsPipeline, needs the package sentencepiece, not installed here: pip install sentencepiece"
        )

    def test_scheduler_whose_package_is_missing(self, folder, monkeypatch, absent):
        """So does a component."""
        absent("scipy")
        monkeypatch.setattr(diffusers, "LMSDiscreteScheduler", dummy_torch_and_scipy_objects.LMSDiscreteScheduler)
        edit(folder, scheduler=["diffusers", "LMSDiscreteScheduler"])
        assert rejection(folder).endswith("needs the package scipy, not installed here: pip install scipy")

    @pytest.mark.parametrize("package", ["ftfy", "torchvision", "google.protobuf", "some_package"])
    def test_package_that_a_library_imports_while_it_loads(self, folder, monkeypatch, package):
        """A package that is only missed during loading is named as well, by its name in the registry."""
        monkeypatch.setitem(sys.modules, package, None)

        def fail(*_, **__):
            __import__(package)

        monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", fail)
        name = {"google.protobuf": "protobuf"}.get(package, package)
        assert rejection(folder).endswith(f"needs the package {name}, not installed here: pip install {name}")

    def test_package_that_only_the_text_of_an_error_names(self, folder, monkeypatch):
        """Tokenizers raise errors that only mention the packages that they lack."""
        monkeypatch.setitem(sys.modules, "tiktoken", None)

        def fail(*_, **__):
            raise ValueError("Could not instantiate the backend tokenizer: you need to have `tiktoken` installed")

        monkeypatch.setattr(diffusers.UNet2DConditionModel, "from_pretrained", fail)
        assert "pip install tiktoken" in rejection(folder)

    @pytest.mark.parametrize("kind", ["StableCascadeCombinedPipeline", "KandinskyV22CombinedPipeline"])
    def test_two_stages(self, folder, kind):
        """Pipelines that run several pipelines are rejected for that reason, before their weights are loaded."""
        edit(folder, _class_name=kind)
        assert f"{kind}, which runs several pipelines one after another" in rejection(folder)

    @pytest.mark.parametrize(
        ("kind", "reason"),
        [
            ("StableDiffusionImg2ImgPipeline", "it starts from an image"),
            ("KandinskyPipeline", "it also needs image_embeds and negative_image_embeds"),
            ("AnimateDiffPipeline", "it makes videos"),
            ("DDPMPipeline", "it does not take prompt and width and height"),
        ],
    )
    def test_other_purposes(self, folder, kind, reason):
        """A pipeline with another purpose is rejected by its class, with the reason."""
        edit(folder, _class_name=kind)
        assert reason in rejection(folder)


class TestTrial:
    """One small image, drawn while the model is loaded."""

    def test_pipeline_that_needs_an_image(self, tmp_path):
        """The pipeline's own reason reaches the operator if it needs an image that its signature makes optional."""
        tiny.build("sdxl").save_pretrained(tmp_path)
        edit(tmp_path, _class_name="StableDiffusionXLInstructPix2PixPipeline")
        with pytest.raises(ModelUnavailable) as caught:
            factory.load_engine(Settings(model=str(tmp_path), device="cpu"), ignore)
        text = checked(str(caught.value))
        assert "is a StableDiffusionXLInstructPix2PixPipeline, which cannot draw an image from a prompt alone: " in text
        assert text.endswith("`image` input cannot be undefined.")

        findings = list(doctor.examine(Settings(model=str(tmp_path), device="cpu")))
        assert not findings[-1].ok
        assert findings[-1].advice == text

    @pytest.mark.parametrize("family", ["sd15", "sdxl", "sana_sprint", "flux"])
    def test_pipeline_that_draws(self, family):
        """Pipelines that draw pass, with one step if possible."""
        trial.check_draws(family, tiny.prompted(family))

    def test_second_order_scheduler(self):
        """A scheduler that takes two calls for a step gets two steps."""
        trial.check_draws("sd15", tiny.build("sd15", scheduler=diffusers.HeunDiscreteScheduler()))

    def test_package_that_a_call_misses(self, monkeypatch):
        """Pipelines use some packages only in their call."""
        pipeline = tiny.build("sd15")
        monkeypatch.setitem(sys.modules, "ftfy", None)

        def encode(*_, **__):
            raise NameError("name 'ftfy' is not defined", name="ftfy")

        monkeypatch.setattr(pipeline, "encode_prompt", encode, raising=False)
        with pytest.raises(ModelUnavailable, match="pip install ftfy"):
            trial.check_draws("model", pipeline)

    @pytest.mark.parametrize("error", [FAILED[0], EXHAUSTED[0]], ids=str)
    def test_failure_of_the_device(self, monkeypatch, error):
        """A failure of the device is not blamed on the pipeline."""
        pipeline = tiny.build("sd15")

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(pipeline.unet, "forward", fail)
        with pytest.raises(type(error)):
            trial.check_draws("model", pipeline)
