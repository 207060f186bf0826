"""Loading a model by name: the result is its pipeline, or one sentence with advice."""

import importlib.util
import json
import os
import pickle

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from calotype_server.engine import loading
from calotype_server.engine.capabilities import Defaults, describe, read_defaults
from support.engine import tiny
from support.engine.device_errors import EXHAUSTED
from support.engine.files.loading import load, rejection
from support.engine.tiny_inputs import arguments

# The hub's client speaks through httpx or its successor, depending on the version.
_HUB_CLIENT = vars(huggingface_hub.utils._http)


httpx = _HUB_CLIENT.get("httpx2") or _HUB_CLIENT["httpx"]


class TestLocalFolder:
    """Folders in the format of diffusers."""

    def test_folder_loads(self, sd15_folder):
        """The loaded pipeline generates the same image as the saved one, bit for bit."""
        pipeline = load(sd15_folder)
        assert type(pipeline) is diffusers.StableDiffusionPipeline
        assert torch.equal(pipeline(**arguments("sd15"))[0], tiny.shared("sd15")(**arguments("sd15"))[0])

    def test_relative_path_and_home(self, sd15_folder, monkeypatch):
        """Relative paths and `~` are accepted."""
        monkeypatch.chdir(sd15_folder.parent)
        monkeypatch.setenv("HOME", str(sd15_folder.parent))
        assert load(f"./{sd15_folder.name}").vae is not None
        assert load(sd15_folder.name).vae is not None
        assert load(f"~/{sd15_folder.name}").vae is not None

    def test_dtype_is_taken(self, sd15_folder):
        """The weights have the requested number format."""
        pipeline = load(sd15_folder, dtype=torch.bfloat16)
        assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.bfloat16}

    def test_local_folder_needs_no_network(self, sd15_folder, offline):
        """A local folder loads without a network."""
        assert load(sd15_folder).unet is not None

    def test_a_folder_ignores_the_revision(self, sd15_folder):
        """A revision, which only the hub has, does not prevent loading."""
        assert load(sd15_folder, revision="main").unet is not None

    @pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
    def test_missing_folder(self, name):
        """The message for a missing folder names it."""
        assert rejection(name) == f"There is no folder {name!r}."

    def test_folder_without_index(self, tmp_path):
        """The message for a folder without model_index.json names that file."""
        assert "model_index.json" in rejection(tmp_path)

    def test_damaged_index(self, folder):
        """A model_index.json with invalid JSON is reported as damage."""
        (folder / "model_index.json").write_text("{not json")
        assert "incomplete or damaged" in rejection(folder)

    @pytest.mark.parametrize("damage", ["cut", "empty", "garbage"])
    @pytest.mark.parametrize("component", ["unet/diffusion_pytorch_model", "text_encoder/model"])
    def test_damaged_weights(self, folder, component, damage):
        """Invalid safetensors are reported as damage, whichever library reads them."""
        file = folder / f"{component}.safetensors"
        file.write_bytes({"cut": file.read_bytes()[:-1000], "empty": b"", "garbage": b"\xff" * 1000}[damage])
        assert "incomplete or damaged" in rejection(folder)

    @pytest.mark.parametrize(
        ("missing", "problem"),
        [
            ("unet/diffusion_pytorch_model.safetensors", "unet has no weights as .safetensors."),
            ("text_encoder/model.safetensors", "text_encoder has no weights as .safetensors."),
            ("vae/config.json", "vae has no config.json."),
            ("scheduler/scheduler_config.json", "It has no files of the scheduler, which model_index.json lists."),
        ],
    )
    def test_missing_file(self, folder, missing, problem):
        """The message for a missing file names it, or the component that it belongs to."""
        (folder / missing).unlink()
        assert rejection(folder) == f"The model folder {str(folder)!r} cannot be loaded. {problem}"


class TestForeignCode:
    """Weights are data: no code that comes with them is executed."""

    def test_pickled_weights_are_rejected_unread(self, folder, tmp_path):
        """Weights that exist only as a pickle are rejected without unpickling them."""
        marker = tmp_path / "executed"

        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(marker),)

        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
        assert "unet has its weights only as diffusion_pytorch_model.bin, a pickle" in rejection(folder)
        assert not marker.exists()

    @staticmethod
    def trap(file, marker):
        file.write_text(
            f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
            "from diffusers import StableDiffusionPipeline as CustomPipeline, UNet2DConditionModel as CustomModel\n"
        )

    def test_custom_pipeline_is_not_imported(self, folder, tmp_path):
        """A pipeline class in a module of the folder is rejected without importing the module, and named."""
        marker = tmp_path / "executed"
        self.trap(folder / "custom_pipeline.py", marker)
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = ["custom_pipeline", "CustomPipeline"]
        (folder / "model_index.json").write_text(json.dumps(index))
        assert "brings its own code for its pipeline, CustomPipeline" in rejection(folder)
        assert not marker.exists()

    def test_custom_component_is_not_imported(self, folder, tmp_path):
        """A component class in a module of the folder is rejected without importing the module."""
        marker = tmp_path / "executed"
        self.trap(folder / "unet" / "custom_unet.py", marker)
        index = json.loads((folder / "model_index.json").read_text())
        index["unet"] = ["custom_unet", "CustomModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
        assert "brings its own code for its unet, CustomModel" in rejection(folder)
        assert not marker.exists()


class TestHub:
    """Hub ids, without a hub."""

    @pytest.fixture
    def index(self, monkeypatch, sd15_folder):
        """The index of the tiny model, as if the hub had it."""
        index = str(sd15_folder / "model_index.json")
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: index)

    def test_no_network(self, offline):
        """Without a network and a cached copy, the message names both and suggests alternatives."""
        text = rejection("some-org/some-model")
        assert "cannot be reached" in text
        assert "'some-org/some-model'" in text
        assert "neither a local path" in text

    def test_the_network_is_tried_once(self, offline, monkeypatch):
        """Without the network, the files of the model are not listed to explain the error: each try takes seconds."""
        monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *_, **__: pytest.fail("listed"))
        assert "cannot be reached" in rejection("some-org/some-model")

    def test_hub_is_down(self, offline, monkeypatch):
        """A failing connection gives the same message as no network."""
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

        def refuse(request):
            raise httpx.ConnectError("connection refused", request=request)

        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(refuse)))
        try:
            assert "cannot be reached" in rejection("some-org/some-model")
        finally:
            huggingface_hub.close_session()
            huggingface_hub.set_client_factory(_HUB_CLIENT["default_client_factory"])

    @pytest.mark.parametrize("name", ["some model", "a/b/c", "org/name?", "org/", "sd15", "https://hub/org/name"])
    def test_malformed_name(self, name, offline):
        """A name that is neither a path nor a hub id is rejected without a request."""
        assert "neither a folder nor a file nor a hub id" in rejection(name)

    @pytest.mark.parametrize("name", ["org/..", "-org/name", "org/na--me"])
    def test_name_that_the_hub_forbids(self, name, offline):
        """A name that the hub forbids gives a message as well."""
        assert repr(name) in rejection(name)

    @pytest.mark.parametrize(
        ("error", "hint"),
        [
            # The tool was called huggingface-cli before huggingface_hub 1.0.
            (GatedRepoError, "accept the terms of 'some-org/some-model' and log in: hf auth login"),
            (RepositoryNotFoundError, "has no repository"),
        ],
    )
    def test_a_rejection_by_the_hub_gives_advice(self, monkeypatch, error, hint):
        """If the hub rejects the request, the message says what to do."""
        response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))

        def from_pretrained(*args, **kwargs):
            raise error("long text with a URL", response=response)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_pretrained)
        text = rejection("some-org/some-model")
        assert hint in text
        assert "URL" not in text

    def test_only_safetensors_are_requested_from_the_hub(self, monkeypatch, index):
        """Only safetensors of the given revision are requested, and no code."""
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

    def test_unforeseen_error(self, monkeypatch, index):
        """The message for an unknown error contains its first line, without a traceback."""

        def from_pretrained(*args, **kwargs):
            raise ZeroDivisionError("what went wrong\nand much more")

        def unreachable(*args, **kwargs):
            raise OSError

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
        text = rejection("some-org/some-model")
        assert "what went wrong" in text
        assert "much more" not in text


class TestBundled:
    """The bundled model."""

    def test_bundled_resolves(self):
        """`bundled` is a text-to-image pipeline with its own defaults, and its files are in the package."""
        from calotype_bundled_model import PATH

        pipeline = load("bundled")
        model = describe("bundled", pipeline, read_defaults(PATH))
        assert model.takes_negative_prompt
        assert model.max_prompt_tokens > 0
        assert read_defaults(PATH) != Defaults()

    def test_not_installed(self, monkeypatch):
        """Without the package the message says how to install it."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
        assert "pip install calotype-bundled-model" in rejection("bundled")


class TestOtherPipelines:
    """Unsupported pipelines are rejected at start, not at the first request."""

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
        text = rejection(tmp_path)
        assert "DDPMPipeline" in text
        assert "does not turn text into images" in text

    @pytest.mark.parametrize(
        "kind", [diffusers.StableDiffusionImg2ImgPipeline, diffusers.StableDiffusionInpaintPipeline]
    )
    def test_pipeline_that_starts_from_an_image(self, folder, kind):
        """A pipeline that starts from an image is not text-to-image, even if its signature makes the image optional."""
        index = json.loads((folder / "model_index.json").read_text())
        index["_class_name"] = kind.__name__
        (folder / "model_index.json").write_text(json.dumps(index))
        text = rejection(folder)
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
        assert "does not turn text into images" in rejection(sd15_folder)

    def test_pipeline_without_a_decoder(self, monkeypatch, sd15_folder):
        """A pipeline without a VAE has no latents to preview."""

        class PixelPipeline:
            scheduler = object()

            def __call__(self, prompt, width=None, height=None, num_inference_steps=50):
                raise NotImplementedError

            def to(self, device):
                return self

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: PixelPipeline())
        assert "PixelPipeline, which is not a latent diffusion pipeline" in rejection(sd15_folder)

    @pytest.mark.parametrize("error", EXHAUSTED, ids=str)
    def test_model_that_does_not_fit(self, monkeypatch, sd15_folder, error):
        """A model larger than the device's memory gives a message that says so."""

        def from_pretrained(*args, **kwargs):
            raise error

        monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
        assert "does not fit into the memory of cpu" in rejection(sd15_folder)


def test_libraries_are_quiet(sd15_folder, capfd):
    """Loading shows no progress bars and prints nothing."""
    diffusers.utils.logging.enable_progress_bar()
    diffusers.utils.logging.set_verbosity_info()
    load(sd15_folder)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert loading.BUNDLED == "bundled"
