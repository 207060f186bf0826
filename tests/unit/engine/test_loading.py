"""From a model's name to its pipeline, or to one sentence that says what to do."""

import copy
import importlib.util
import json
import os
import pickle
import re
import shutil

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from calotype_server.engine.factory import load_engine
from calotype_server.engine import loading
from calotype_server.engine.capabilities import Defaults, describe, read_defaults
from calotype_server.engine.loading import load_pipeline, load_tiny_vae, pick_device, pick_dtype
from calotype_server.engine.preview.budget import PreviewBudget
from calotype_server.errors import ModelUnavailable
from calotype_server.observability.events import ignore
from calotype_server.settings import Settings
from calotype_server.types import PreviewMethod
from support.engine import tiny
from support.engine.tiny_inputs import arguments
from support.engine.tiny_unets import tiny_vae

CPU = torch.device("cpu")

# The hub's client speaks through httpx or its successor, depending on the version.
_HUB_CLIENT = vars(huggingface_hub.utils._http)
httpx = _HUB_CLIENT.get("httpx2") or _HUB_CLIENT["httpx"]


def load(model, **options):
    """Loads with the defaults of a server on a CPU."""
    return load_pipeline(
        str(model), **{"revision": None, "variant": None, "device": CPU, "dtype": torch.float32, **options}
    )


def refusal(model, **options):
    """The sentence for the operator when a model is refused; it is checked for what no such sentence may hold."""
    with pytest.raises(ModelUnavailable) as caught:
        load(model, **options)
    text = str(caught.value)
    assert "Traceback" not in text
    assert "\n" not in text
    assert not re.search(r"line \d+, in ", text)
    assert 20 < len(text) < 700
    return text


@pytest.fixture
def folder(sd15_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(sd15_folder, tmp_path / "model")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and nothing in the hub's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


class TestLocalFolder:
    """A folder that diffusers saved."""

    def test_folder_loads(self, sd15_folder):
        """The pipeline of a folder is the one that was saved, to the last bit of its picture."""
        pipeline = load(sd15_folder)
        assert type(pipeline) is diffusers.StableDiffusionPipeline
        assert torch.equal(pipeline(**arguments("sd15"))[0], tiny.shared("sd15")(**arguments("sd15"))[0])

    def test_relative_path_and_home(self, sd15_folder, monkeypatch):
        """Relative paths and `~` lead to a folder too."""
        monkeypatch.chdir(sd15_folder.parent)
        monkeypatch.setenv("HOME", str(sd15_folder.parent))
        assert load(f"./{sd15_folder.name}").vae is not None
        assert load(sd15_folder.name).vae is not None
        assert load(f"~/{sd15_folder.name}").vae is not None

    def test_dtype_is_taken(self, sd15_folder):
        """The weights come in the number format that was asked for."""
        pipeline = load(sd15_folder, dtype=torch.bfloat16)
        assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}

    def test_local_folder_needs_no_network(self, sd15_folder, offline):
        """A local folder loads without the hub."""
        assert load(sd15_folder).unet is not None

    def test_revision_means_nothing_to_a_folder(self, sd15_folder):
        """A revision, which only the hub has, is no obstacle."""
        assert load(sd15_folder, revision="main").unet is not None

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
    def test_missing_folder(self, name):
        """A path to nothing is said to be one, by its name."""
        assert refusal(name) == f"There is no folder {name!r}."

    def test_file_is_no_folder(self, tmp_path):
        """A single file is not a model, whatever its suffix."""
        file = tmp_path / "model.safetensors"
        file.touch()
        assert refusal(file) == f"There is no folder {str(file)!r}."

    def test_folder_without_index(self, tmp_path):
        """A folder without model_index.json is told what it lacks."""
        assert "model_index.json" in refusal(tmp_path)

    def test_damaged_index(self, folder):
        """A model_index.json that is no JSON is a damaged folder."""
        (folder / "model_index.json").write_text("{not json")
        assert "incomplete or damaged" in refusal(folder)

    @pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
    @pytest.mark.parametrize("component", ["unet/diffusion_pytorch_model", "text_encoder/model"])
    def test_damaged_weights(self, folder, component, damage):
        """Weights that are no safetensors are a damaged folder, whoever reads them."""
        file = folder / f"{component}.safetensors"
        file.write_bytes({"cut": file.read_bytes()[:-1000], "empty": b"", "garbage": b"\xff" * 1000}[damage])
        assert "incomplete or damaged" in refusal(folder)

    @pytest.mark.parametrize(
        "missing",
        [
            "unet/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "vae/config.json",
            "scheduler/scheduler_config.json",
        ],
    )
    def test_missing_file(self, folder, missing):
        """A folder that lacks a file is an incomplete one, and the sentence says what a complete one holds."""
        (folder / missing).unlink()
        text = refusal(folder)
        assert "incomplete or damaged" in text
        assert ".safetensors" in text

    def test_missing_variant(self, sd15_folder):
        """A variant that the folder does not have is refused rather than replaced."""
        assert "incomplete or damaged" in refusal(sd15_folder, variant="fp16")


class TestForeignCode:
    """Weights are data: nothing that comes with them is executed."""

    def test_pickled_weights_are_refused_unread(self, folder, tmp_path):
        """Weights that exist as a pickle only are refused, and the pickle is not opened."""
        marker = tmp_path / "executed"

        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
        assert ".safetensors" in refusal(folder)
        assert not marker.exists()

    @staticmethod
    def trap(file, marker):
        file.write_text(
            f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
            "from diffusers import StableDiffusionPipeline as CustomPipeline, UNet2DConditionModel as CustomModel\n"
        )

    def test_custom_pipeline_is_not_imported(self, folder, tmp_path):
        """A pipeline class in a module of the folder is refused without a look at the module."""
        marker = tmp_path / "executed"
        self.trap(folder / "custom_pipeline.py", marker)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = ["custom_pipeline", "CustomPipeline"]
        (folder / "model_index.json").write_text(json.dumps(index))
        assert str(folder) in refusal(folder)
        assert not marker.exists()

    def test_custom_component_is_not_imported(self, folder, tmp_path):
        """A component class in a module of the folder is refused without a look at the module."""
        marker = tmp_path / "executed"
        self.trap(folder / "unet" / "custom_unet.py", marker)
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["custom_unet", "CustomModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
        assert str(folder) in refusal(folder)
        assert not marker.exists()


class TestHub:
    """A hub id, without a hub."""

    def test_no_network(self, offline):
        """Without a network and without a cached copy, the operator is told of both, and of the way out."""
        text = refusal("some-org/some-model")
        assert "cannot be reached" in text
        assert "'some-org/some-model'" in text
        assert "--model bundled" in text

    def test_hub_is_down(self, offline, monkeypatch):
        """A connection that fails is told as no network is."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

        def refuse(request):
            raise httpx.ConnectError("connection refused", request=request)

        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(refuse)))
        try:
            assert "cannot be reached" in refusal("some-org/some-model")
        finally:
            huggingface_hub.close_session()
            huggingface_hub.set_client_factory(_HUB_CLIENT["default_client_factory"])

    @pytest.mark.parametrize("name", ["some model", "a/b/c", "org/name?", "org/", "sd15", "https://hub/org/name"])
    def test_malformed_name(self, name, offline):
        """A name that is neither path nor hub id is refused before anything is asked."""
        assert "neither a folder nor a hub id" in refusal(name)

    @pytest.mark.parametrize("name", ["org/..", "-org/name", "org/na--me"])
    def test_name_that_the_hub_forbids(self, name, offline):
        """A name that looks like a hub id and cannot be one gets a sentence as well."""
        assert repr(name) in refusal(name)

    @pytest.mark.parametrize(
        ("error", "hint"),
        [
            # The tool was called huggingface-cli before huggingface_hub 1.0.
            (GatedRepoError, "accept the terms of 'some-org/some-model' and log in: hf auth login"),
            (RepositoryNotFoundError, "has no model"),
        ],
    )
    def test_hub_says_no(self, monkeypatch, error, hint):
        """What the hub refuses is told with what to do about it."""
        response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))

        def from_pretrained(*args, **kwargs):
            raise error("long text with a URL", response=response)

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        text = refusal("some-org/some-model")
        assert hint in text
        assert "URL" not in text

    def test_hub_is_asked_for_safe_weights_only(self, monkeypatch):
        """Whatever the hub holds, only safetensors of the given revision are asked for, and no code."""
        asked = {}

        def from_pretrained(source, **options):
            asked.update(options, source=source)
            return tiny.shared("sd15")

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        load("some-org/some-model", revision="v2", variant="fp16")
        assert asked["source"] == "some-org/some-model"
        assert (asked["revision"], asked["variant"]) == ("v2", "fp16")
        assert asked["use_safetensors"] is True
        assert asked["trust_remote_code"] is False

    def test_unforeseen_error(self, monkeypatch):
        """An error that nobody foresaw is told to the operator in its own first line, without its traceback."""

        def from_pretrained(*args, **kwargs):
            raise ZeroDivisionError("what went wrong\nand much more")

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        text = refusal("some-org/some-model")
        assert "what went wrong" in text
        assert "much more" not in text


class TestBundled:
    """The model that comes with the service."""

    def test_bundled_resolves(self):
        """`bundled` is a text-to-image pipeline with defaults of its own, and its files are in the package."""
        from calotype_bundled_model import PATH

        pipeline = load("bundled")
        model = describe("bundled", pipeline, read_defaults(PATH))
        assert model.takes_negative_prompt
        assert model.max_prompt_tokens > 0
        assert read_defaults(PATH) != Defaults()

    def test_not_installed(self, monkeypatch):
        """Without the package the operator is told how to get it."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert "pip install calotype-bundled-model" in refusal("bundled")


class TestTinyVae:
    """A small decoder for previews, beside the model's own."""

    @pytest.fixture
    def tiny_folder(self, tmp_path):
        """A folder with an `AutoencoderTiny` of four latent channels."""
        tiny_vae().save_pretrained(tmp_path / "tiny-vae")
        return tmp_path / "tiny-vae"

    @staticmethod
    def refused(name, like):
        with pytest.raises(ModelUnavailable) as caught:
            load_tiny_vae(str(name), like)
        text = str(caught.value)
        assert "\n" not in text
        assert str(name) in text
        return text

    def test_folder_loads(self, tiny_folder, sd15):
        """It comes ready to draw, where and in the number format of the VAE that it stands in for."""
        vae = load_tiny_vae(str(tiny_folder), sd15.vae)
        assert type(vae) is diffusers.AutoencoderTiny
        assert not vae.training
        half = copy.deepcopy(sd15.vae).to(torch.bfloat16)
        assert load_tiny_vae(str(tiny_folder), half).dtype is torch.bfloat16

    def test_relative_path(self, tiny_folder, sd15, monkeypatch):
        """A path need not be absolute."""
        monkeypatch.chdir(tiny_folder.parent)
        assert load_tiny_vae(f"./{tiny_folder.name}", sd15.vae)
        assert load_tiny_vae(tiny_folder.name, sd15.vae)

    @pytest.mark.parametrize("family", ["z_image", "qwen_image"])
    def test_wrong_number_of_channels(self, tmp_path, family):
        """A decoder of other latents is refused with both numbers, whatever the model's VAE calls its own."""
        tiny_vae(channels=3).save_pretrained(tmp_path)
        text = self.refused(tmp_path, tiny.shared(family).vae)
        assert "has 3 latent channels" in text
        assert f"the model has {16 if family == 'z_image' else 4}." in text

    def test_missing_folder(self, tmp_path, sd15):
        """A folder that is not there is named."""
        assert "AutoencoderTiny" in self.refused(tmp_path / "nothing", sd15.vae)

    def test_something_else(self, sd15_folder, sd15):
        """A full VAE, or a pipeline, is no tiny one."""
        assert "AutoencoderTiny" in self.refused(sd15_folder, sd15.vae)

    def test_hub_without_network(self, offline, sd15):
        """An id that is not in the local cache is named, in one line."""
        assert "org/no-such-vae" in self.refused("org/no-such-vae", sd15.vae)

    def test_pickled_weights_are_refused(self, tiny_folder, tmp_path, sd15):
        """Only safetensors are read."""
        (tmp_path / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
        (tmp_path / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"weight": 0}))
        self.refused(tmp_path, sd15.vae)


class TestServing:
    """What the composition root makes of the settings."""

    @staticmethod
    def engine(folder, tmp_path, **settings):
        """The engine that `calotype serve` would run."""
        chosen = Settings(model=str(folder), device="cpu", threads=1, cache_dir=tmp_path, **settings)
        engine = load_engine(chosen, PreviewBudget(chosen.preview_budget), ignore)
        engine.close()
        return engine.model.preview_methods

    def test_tiny_vae_by_flag_and_by_file(self, folder, tmp_path):
        """A flag names it, or the model's own `calotype.json`, by a path from there; without either there is none."""
        tiny_vae().save_pretrained(folder / "previews")
        assert PreviewMethod.TINY_VAE not in self.engine(folder, tmp_path)
        assert PreviewMethod.TINY_VAE in self.engine(folder, tmp_path, tiny_vae=str(folder / "previews"))
        (folder / "calotype.json").write_text(json.dumps({"tiny_vae": "previews"}))
        assert PreviewMethod.TINY_VAE in self.engine(folder, tmp_path, preview_method="tiny_vae")
        assert self.engine(folder, tmp_path, preview_methods="head") == (PreviewMethod.HEAD,)

    def test_a_default_method_that_is_not_there_is_refused(self, sd15_folder, tmp_path):
        """Rather than each request later: the sentence names the flag and the methods that there are."""
        with pytest.raises(ModelUnavailable, match=r"--preview-method is tiny_vae.*--tiny-vae.*auto, head, full_vae"):
            self.engine(sd15_folder, tmp_path, preview_method="tiny_vae")


class TestOtherPipelines:
    """Pipelines that Calotype cannot drive are refused at the start, not at the first request."""

    def test_unconditional_pipeline(self, tmp_path):
        """A pipeline without a prompt is not text-to-image."""
        unet = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
        )
        diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
        text = refusal(tmp_path)
        assert "DDPMPipeline" in text
        assert "does not turn text into images" in text

    @pytest.mark.parametrize(
        "kind", [diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline]
    )
    def test_pipeline_that_starts_from_an_image(self, folder, kind):
        """A pipeline that begins with an image is not text-to-image, even if its signature makes the image optional."""
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = kind.__name__
        (folder / "model_index.json").write_text(json.dumps(index))
        text = refusal(folder)
        assert kind.__name__ in text
        assert "does not turn text into images" in text

    def test_pipeline_that_requires_an_image(self, monkeypatch, sd15_folder):
        """A pipeline whose image is a required parameter is not text-to-image."""

        class EditPipeline:
            vae = scheduler = object()

            def __call__(self, prompt, image, width=None, height=None, num_inference_steps=50):
                raise NotImplementedError

            def to(self, device):
                return self

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: EditPipeline())
        assert "does not turn text into images" in refusal(sd15_folder)

    def test_pipeline_without_a_decoder(self, monkeypatch, sd15_folder):
        """A pipeline that works on pixels has no latents to show."""

        class PixelPipeline:
            scheduler = object()

            def __call__(self, prompt, width=None, height=None, num_inference_steps=50):
                raise NotImplementedError

            def to(self, device):
                return self

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: PixelPipeline())
        assert "PixelPipeline, which is not a latent diffusion pipeline" in refusal(sd15_folder)

    def test_model_that_does_not_fit(self, monkeypatch, sd15_folder):
        """A model larger than the device's memory is told as that."""

        def from_pretrained(*args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        assert "does not fit into the memory of cpu" in refusal(sd15_folder)


class TestDevice:
    """Where to run, and in which number format."""

    def test_default_without_cuda(self, monkeypatch):
        """Without CUDA it is the CPU, in float32."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert pick_device(None) == CPU
        assert pick_dtype(None, CPU) is torch.float32

    def test_default_with_cuda(self, monkeypatch):
        """With CUDA it is the first device, in bfloat16 where it knows that, else in float16."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        device = pick_device(None)
        assert device == torch.device("cuda", 0)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        assert pick_dtype(None, device) is torch.bfloat16
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
        assert pick_dtype(None, device) is torch.float16

    @pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
    def test_given_dtype(self, name):
        """The operator's choice of a number format holds on every device."""
        assert pick_dtype(name, CPU) is getattr(torch, name)

    def test_given_device(self):
        """The operator's choice of a device holds."""
        assert pick_device("cpu") == CPU

    @pytest.mark.parametrize("name", ["toaster", "cuda:99", "cpu:x", ""])
    def test_device_that_is_not_there(self, name):
        """A device that is not there, or is no device at all, is told with the one that always is."""
        with pytest.raises(ModelUnavailable, match="--device cpu"):
            pick_device(name)


def test_libraries_are_quiet(sd15_folder, capfd):
    """Loading draws no progress bars and prints nothing: the terminal is the server's own."""
    diffusers.utils.logging.enable_progress_bar()
    diffusers.utils.logging.set_verbosity_info()
    load(sd15_folder)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert loading.BUNDLED == "bundled"
